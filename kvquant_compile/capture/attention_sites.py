"""Raw graph -> attend markers: find where cached keys and values are attended, then replace it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from kvquant_compile.capture.edit import SIZE, add_call, add_transpose, later, sort_topologically
from kvquant_compile.capture.markers import APPEND, ATTEND, MASK
from kvquant_compile.capture.ops import CARRIES, op_name, origin
from kvquant_compile.capture.site import Site
from kvquant_compile.capture.site_meaning import Meaning, understand
from kvquant_compile.errors import UnsupportedLayerError

_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm")
# Between scores and weights there is no projection: behind one, another attention begins.
_PROJECTIONS = ("linear", "addmm", "mm")
# Names of the buffers that hold the slopes of position biases.
_SLOPES = "kvquant_slopes_"


@dataclass(frozen=True)
class _Inputs:
    past: fx.Node
    batch: fx.Node
    queries: fx.Node
    padding: fx.Node | None


def mark_attention(gm: fx.GraphModule) -> list[Meaning]:
    """Replace every attention over cached keys and values by mask and attend markers.

    Returns:
        What each attention means, in the order of the appends.

    Raises:
        UnsupportedLayerError: no attention reads a cache, or one of unknown meaning does.
    """
    sites: list[Site] = []
    for append in gm.graph.find_nodes(op="call_function", target=APPEND):
        found = list(_sites(gm.graph, append))
        if not found:
            raise UnsupportedLayerError(
                "a cache layer cannot be captured",
                where=f"layer {append.args[2]}",
                why="no scaled_dot_product_attention and no matmul-softmax-matmul reads its keys"
                " and values",
                do="Use one of the two spellings, with four-dimensional queries.",
            )
        sites += found
    return mark_sites(gm, sites)


def mark_sites(gm: fx.GraphModule, sites: Sequence[Site]) -> list[Meaning]:
    """Replace the given attention sites by mask and attend markers; returns their meanings.

    Raises:
        UnsupportedLayerError: one has an unknown meaning.
    """
    graph = gm.graph
    inputs = _inputs(graph)
    masks: dict[int, fx.Node] = {}
    meanings = []
    for site in sites:
        _check_heads(site)
        meaning = understand(gm, site)
        meanings.append(meaning)
        if meaning.window not in masks:
            masks[meaning.window] = _mask(graph, inputs, meaning)
        _replace(gm, site, meaning, masks[meaning.window])
    graph.eliminate_dead_code()
    sort_topologically(graph)
    graph.lint()
    gm.recompile()
    return meanings


def _check_heads(site: Site) -> None:
    keys, values = (int(node.meta["val"].shape[1]) for node in (site.key, site.value))
    if keys != values:
        raise UnsupportedLayerError(
            "an attention layer cannot be captured",
            where=f"layer {site.layer}",
            why=f"it caches {keys} heads of keys and {values} of values",
            do="Cache as many heads of values as of keys.",
        )


def _inputs(graph: fx.Graph) -> _Inputs:
    placeholders = {str(n.target): n for n in graph.find_nodes(op="placeholder")}
    first, past = next(iter(placeholders.values())), placeholders["past"]
    shape = first.meta["val"].shape
    batch = add_call(graph, past, SIZE, (first, 0), shape[0])
    queries = add_call(graph, batch, SIZE, (first, 1), shape[1])
    return _Inputs(past, batch, queries, placeholders.get("attention_mask"))


def _sites(graph: fx.Graph, append: fx.Node) -> Iterator[Site]:
    key, value = sorted(append.users, key=lambda node: int(node.args[1]))  # type: ignore[arg-type]
    layer = int(append.args[2])  # type: ignore[arg-type]
    for out, query, *read in attention_cuts(graph, {key, value}):
        if read == [key, value]:
            yield Site(layer, out, query, key, value)


def attention_cuts(
    graph: fx.Graph, caches: Container[fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, fx.Node]]:
    """Attentions whose keys and values are views of the nodes ``caches``.

    Yields:
        (output, query, the cache node of the keys, that of the values).
    """
    for node in graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        if name == "scaled_dot_product_attention":
            query, attended, read = node.args[:3]
            key, value = origin(attended), origin(read)
            if key in caches and value in caches:
                yield node, query, key, value
        elif name in _PRODUCTS:
            weights, read = _operands(node)
            value = origin(read)
            found = _query(weights, caches) if value in caches else None
            if found is not None:
                yield _heads_after(node), _heads_before(found[0]), found[1], value


def _heads_before(node: fx.Node) -> fx.Node:
    """The four-dimensional tensor that a query [B * H, S, D] is a view of; else the query."""
    moved = node
    while moved.meta["val"].ndim != 4 and op_name(moved) in CARRIES:
        moved = moved.all_input_nodes[0]
    return moved if moved.meta["val"].ndim == 4 else node


def _heads_after(node: fx.Node) -> fx.Node:
    """The four-dimensional view of an output [B * H, S, D]; else the output."""
    moved = node
    while moved.meta["val"].ndim != 4 and len(moved.users) == 1:
        user = next(iter(moved.users))
        if op_name(user) not in CARRIES:
            break
        moved = user
    return moved if moved.meta["val"].ndim == 4 else node


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    name = op_name(node)
    operands = node.args[1] if name == "einsum" else node.args
    if name == "baddbmm":
        operands = node.args[1:]
    first, second = operands[:2]  # type: ignore[index,misc]
    return first, second  # type: ignore[return-value]


def _query(weights: fx.Node, caches: Container[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The product with cached keys that the weights come from: its other operand, and the keys."""
    pending, seen = [weights], {weights}
    while pending:
        node = pending.pop(0)
        if node.op == "call_function" and op_name(node) in _PRODUCTS:
            a, b = _operands(node)
            for query, other in ((a, b), (b, a)):
                key = origin(other)
                if key in caches:
                    return query, key
        if node.op == "call_function" and op_name(node) in (*_PRODUCTS, *_PROJECTIONS):
            continue
        pending += [i for i in node.all_input_nodes if i not in seen]
        seen.update(node.all_input_nodes)
    return None


def _mask(graph: fx.Graph, inputs: _Inputs, meaning: Meaning) -> fx.Node:
    size = inputs.queries.meta["val"]
    like = inputs.batch.args[0].meta["val"]  # type: ignore[union-attr]
    val = like.new_empty(inputs.batch.meta["val"], 1, size, size, dtype=torch.bool)
    args = (inputs.padding, inputs.batch, inputs.queries, inputs.past,
            meaning.kind, meaning.window, like.device)  # fmt: skip
    return add_call(graph, inputs.queries, MASK, args, val)


def _replace(gm: fx.GraphModule, site: Site, meaning: Meaning, mask: fx.Node) -> None:
    graph = gm.graph
    query = site.query if site.query_layout == "bhsd" else add_transpose(graph, site.query)
    fake, v = query.meta["val"], site.value.meta["val"]
    if fake.dtype != v.dtype:  # scores in float32, whatever is cached (gptj): the ops' own way
        query = add_call(graph, query, torch.ops.aten.to.dtype, (query, v.dtype), fake.to(v.dtype))
    val = v.new_empty(fake.shape[0], fake.shape[2], fake.shape[1], v.shape[3])
    bias = [_slopes(gm, site, meaning)] if meaning.slopes else []
    args = (query, site.key, site.value, mask, None, site.layer,
            meaning.scale, meaning.softcap, meaning.window, True, *bias)  # fmt: skip
    where = later(graph, query, site.key, site.value, mask)
    attend = add_call(graph, where, ATTEND, args, val)
    attend.meta["stack_trace"] = site.out.meta.get("stack_trace", "")
    result = attend if site.out_layout == "bshd" else add_transpose(graph, attend)
    site.out.replace_all_uses_with(result)
    graph.erase_node(site.out)  # dead code elimination keeps sdpa: it may draw random numbers


def _slopes(gm: fx.GraphModule, site: Site, meaning: Meaning) -> fx.Node:
    """A constant [Hq] float32."""
    name = f"{_SLOPES}{site.layer}"
    values = torch.tensor(meaning.slopes, device=site.value.meta["val"].device)
    gm.register_buffer(name, values, persistent=False)
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        node = gm.graph.get_attr(name)
    node.meta["val"] = site.value.meta["val"].new_empty(len(meaning.slopes), dtype=torch.float32)
    return node
