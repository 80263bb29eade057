"""Raw graph -> append markers: ``cat([past, new])`` of every cache tensor becomes one append."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvquant_compile.capture.captured import CacheLayout
from kvquant_compile.capture.edit import SIZE, add_call, add_transpose, later, sort_topologically
from kvquant_compile.capture.markers import APPEND
from kvquant_compile.capture.ops import CASTS, op_name
from kvquant_compile.errors import UnsupportedLayerError


def mark_appends(gm: fx.GraphModule, layout: CacheLayout) -> None:
    """Replace cache inputs by ``past`` and their concatenations by append markers.

    The graph's inputs are some of its own, the first of which has the axes [B, S], and one for
    every leaf of the layout; its outputs are a result and the grown leaves. Afterwards ``past``
    has replaced the leaves, and the result is the only output.

    Raises:
        UnsupportedLayerError: a cache tensor grows by something else than one torch.cat, or its
            old content is used by itself.
    """
    graph = gm.graph
    inputs = list(graph.find_nodes(op="placeholder"))
    leaves = inputs[-len(layout.leaves) :]
    own = inputs[: -len(layout.leaves)]
    outputs: Any = graph.output_node().args[0]
    logits, *grown = outputs
    joins = [
        _concatenation(name, leaf, out, 2 if first else 1)
        for name, leaf, out, first in zip(
            layout.leaves, leaves, grown, layout.heads_first, strict=True
        )
    ]
    graph.output_node().args = (logits,)
    past = _sizes_from_past(graph, own, leaves, joins, layout)
    for i in range(0, len(joins), 2):
        _append(graph, layout.leaves[i][0], past, joins[i : i + 2], layout.heads_first[i : i + 2])
    sort_topologically(graph)
    graph.eliminate_dead_code()
    for name, leaf in zip(layout.leaves, leaves, strict=True):
        if leaf.users:
            raise _not_grown(name, f"its past is also read by {next(iter(leaf.users))}")
        graph.erase_node(leaf)
    graph.lint()
    gm.recompile()


def _not_grown(name: tuple[int, str], why: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        "a cache layer cannot be captured",
        where=f"layer {name[0]}, {name[1]}",
        why=why,
        do="Grow each cache tensor by one torch.cat([past, new], dim) along the sequence.",
    )


def _concatenation(name: tuple[int, str], leaf: fx.Node, grown: Any, axis: int) -> fx.Node:
    """The cat node of a cache tensor."""
    while isinstance(grown, fx.Node) and _keeps_dtype(grown):
        grown = grown.args[0]
    if isinstance(grown, fx.Node) and grown.target is torch.ops.aten.cat.default:
        parts, where, *_ = (*grown.args, 0)
        two = isinstance(parts, (list, tuple)) and len(parts) == 2 and parts[0] is leaf
        if two and int(where) % 4 == axis:  # type: ignore[arg-type]
            return grown
    raise _not_grown(name, f"its new content is {grown}, not torch.cat([past, new], {axis})")


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether a node is a cast to the dtype that its input has."""
    source = node.args[0] if node.args else None
    cast = isinstance(source, fx.Node) and op_name(node) in CASTS
    return cast and bool(node.meta["val"].dtype == source.meta["val"].dtype)  # type: ignore[union-attr]


def _sizes_from_past(
    graph: fx.Graph,
    own: list[fx.Node],
    leaves: list[fx.Node],
    joins: list[fx.Node],
    layout: CacheLayout,
) -> fx.Node:
    """Add the ``past`` input and express every size of a cache tensor by it and by [B, S]."""
    axis = 2 if layout.heads_first[0] else 1
    first = own[0]
    with graph.inserting_after(own[-1]):
        past = graph.placeholder("past")
    past.meta["val"] = leaves[0].meta["val"].shape[axis]
    batch = add_call(graph, past, SIZE, (first, 0), first.meta["val"].shape[0])
    new = add_call(graph, batch, SIZE, (first, 1), first.meta["val"].shape[1])
    total = add_call(graph, new, operator.add, (past, new), past.meta["val"] + new.meta["val"])
    for nodes, length in ((leaves, past), (joins, total)):
        for node, heads_first in zip(nodes, layout.heads_first, strict=True):
            for user in [u for u in node.users if u.target is SIZE]:
                at = user.args[1]
                if at == 0 or at == (2 if heads_first else 1):
                    user.replace_all_uses_with(batch if at == 0 else length)
    return past


def _append(
    graph: fx.Graph, layer: int, past: fx.Node, joins: list[fx.Node], first: tuple[bool, ...]
) -> None:
    fresh = []
    for join, heads_first in zip(joins, first, strict=True):
        new = join.args[0][1]  # type: ignore[index]
        assert isinstance(new, fx.Node)
        fresh.append(new if heads_first else add_transpose(graph, new))
    values = tuple(node.meta["val"] for node in fresh)
    append = add_call(graph, later(graph, *fresh), APPEND, (*fresh, layer, past), values)
    for i, (join, heads_first) in enumerate(zip(joins, first, strict=True)):
        whole = add_call(graph, append, operator.getitem, (append, i), values[i])
        join.replace_all_uses_with(whole if heads_first else add_transpose(graph, whole))
