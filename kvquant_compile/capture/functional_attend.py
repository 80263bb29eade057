"""Raw graph -> attend markers: find where cached keys and values are attended, then replace it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from kvquant_compile.capture.captured import CacheLayout
from kvquant_compile.capture.edit import SIZE, add_call, add_transpose, later, sort_topologically
from kvquant_compile.capture.markers import APPEND, ATTEND, MASK
from kvquant_compile.capture.ops import op_name, origin
from kvquant_compile.capture.site_meaning import Meaning, Site, understand
from kvquant_compile.errors import UnsupportedLayerError

_PRODUCTS = ("matmul", "bmm", "einsum")


@dataclass(frozen=True)
class _Inputs:
    past: fx.Node
    batch: fx.Node
    queries: fx.Node


def mark_attention(gm: fx.GraphModule, layout: CacheLayout) -> bool:
    """Replace every attention over cached keys and values by mask and attend markers.

    Returns:
        Whether some attention had no mask of its own in the traced branch and was taken as
        causal; comparing with the original has to confirm it then.

    Raises:
        UnsupportedLayerError: no attention reads a cache, or one of unknown meaning does.
    """
    graph = gm.graph
    inputs = _sizes(graph)
    masks: dict[int, fx.Node] = {}
    assumed = False
    for append in graph.find_nodes(op="call_function", target=APPEND):
        sites = list(_sites(graph, append))
        if not sites:
            raise UnsupportedLayerError(
                "a cache layer cannot be captured",
                where=f"layer {append.args[2]}",
                why="no scaled_dot_product_attention and no matmul-softmax-matmul reads its keys"
                " and values",
                do="Use one of the two spellings, with four-dimensional queries.",
            )
        for site in sites:
            meaning = understand(gm, site)
            assumed |= meaning.mask_assumed
            if meaning.window not in masks:
                masks[meaning.window] = _mask(graph, inputs, meaning)
            _replace(graph, site, meaning, masks[meaning.window])
    graph.eliminate_dead_code()
    sort_topologically(graph)
    graph.lint()
    gm.recompile()
    return assumed


def _sizes(graph: fx.Graph) -> _Inputs:
    ids, past = graph.find_nodes(op="placeholder")
    batch = add_call(graph, past, SIZE, (ids, 0), ids.meta["val"].shape[0])
    queries = add_call(graph, batch, SIZE, (ids, 1), ids.meta["val"].shape[1])
    return _Inputs(past, batch, queries)


def _sites(graph: fx.Graph, append: fx.Node) -> Iterator[Site]:
    key, value = sorted(append.users, key=lambda node: int(node.args[1]))  # type: ignore[arg-type]
    layer = int(append.args[2])  # type: ignore[arg-type]
    for node in graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        if name == "scaled_dot_product_attention":
            query, attended, read = node.args[:3]
            if origin(attended) is key and origin(read) is value:
                yield Site(layer, node, query, key, value)
        elif name in _PRODUCTS:
            weights, read = _operands(node)
            query = _query(weights, key) if origin(read) is value else None
            if query is not None:
                yield Site(layer, node, query, key, value)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    operands = node.args[1] if op_name(node) == "einsum" else node.args
    first, second = operands[:2]  # type: ignore[index,misc]
    return first, second  # type: ignore[return-value]


def _query(weights: fx.Node, key: fx.Node) -> fx.Node | None:
    """The other operand of the product with the keys that the weights come from."""
    pending, seen = [weights], {weights}
    while pending:
        node = pending.pop(0)
        if node.op == "call_function" and op_name(node) in _PRODUCTS:
            a, b = _operands(node)
            for query, other in ((a, b), (b, a)):
                if origin(other) is key:
                    return query
            continue
        pending += [i for i in node.all_input_nodes if i not in seen]
        seen.update(node.all_input_nodes)
    return None


def _mask(graph: fx.Graph, inputs: _Inputs, meaning: Meaning) -> fx.Node:
    size = inputs.queries.meta["val"]
    like = inputs.batch.args[0].meta["val"]  # type: ignore[union-attr]
    val = like.new_empty(inputs.batch.meta["val"], 1, size, size, dtype=torch.bool)
    args = (None, inputs.batch, inputs.queries, inputs.past,
            meaning.kind, meaning.window, like.device)  # fmt: skip
    return add_call(graph, inputs.queries, MASK, args, val)


def _replace(graph: fx.Graph, site: Site, meaning: Meaning, mask: fx.Node) -> None:
    query = site.query if site.query_layout == "bhsd" else add_transpose(graph, site.query)
    fake, v = query.meta["val"], site.value.meta["val"]
    val = v.new_empty(fake.shape[0], fake.shape[2], fake.shape[1], v.shape[3])
    args = (query, site.key, site.value, mask, None, site.layer,
            meaning.scale, meaning.softcap, meaning.window, True)  # fmt: skip
    where = later(graph, query, site.key, site.value, mask)
    attend = add_call(graph, where, ATTEND, args, val)
    attend.meta["stack_trace"] = site.out.meta.get("stack_trace", "")
    result = attend if site.out_layout == "bshd" else add_transpose(graph, attend)
    site.out.replace_all_uses_with(result)
    graph.erase_node(site.out)  # dead code elimination keeps sdpa: it may draw random numbers
