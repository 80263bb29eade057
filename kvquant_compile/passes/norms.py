"""Norms and weights behind a rotation: norms are done before it, weights to the query instead.

Llama 4 and nanochat have a norm without weights behind the rotation of their keys, Hunyuan one
with weights: K = w * N(R k) = w * R N(k), and q . K = (w * q) . R N(k). What is stored then is
N(k). :mod:`.channel_tail` proves from the ops that a norm is a function of the vector's
length; here the graph is changed, and old and new are compared on random vectors at several
positions. The moved key is proved and validated like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.edit import add_op, sort_topologically
from kvquant_compile.capture.markers import APPEND, ATTEND
from kvquant_compile.capture.ops import op_name
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.capture.source_lines import source_line
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.passes.channel_tail import NoTail, Tail, between, tail_of
from kvquant_compile.passes.prove import Prover, from_heads
from kvquant_compile.passes.taint import Taint, float_value, rotation_site, taint

# In the meta of an append: what was moved (for its certificate), or why nothing could be.
MOVED, UNMOVED = "kvquant_moved", "kvquant_unmoved"
_TOLERANCE = 1e-5
_START, _TOKENS, _BATCH = 29, 5, 2
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class _Moved:
    """A rotated vector with its norm before the rotation, and without its weights.

    Attributes:
        tail: what stood behind the rotation.
        pre: the vector before the rotation, from which both are computed.
        end: the new vector: times the weights, it is the old one.
    """

    tail: Tail
    pre: fx.Node
    end: fx.Node


def commute_norms(captured: Captured) -> None:
    """Move norms behind the rotations of keys before them, and weights there to the queries.

    Only where the moved key has a proved rotation; other keys stay as they are.
    """
    gm = captured.graph_module
    known = taint(gm.graph, *captured.data_inputs)
    appends = gm.graph.find_nodes(op="call_function", target=APPEND)
    keys = {a: m for a in appends if (m := _moved_key(captured, known, a)) is not None}
    if not keys:
        return
    readers = {append: _readers(append) for append in keys}
    moved = _moved_queries(captured, known, readers.values())
    prover = Prover(captured)  # of all that is new
    queries = {query: _query(prover, query, moved.get(query)) for query in moved}
    for append, key in keys.items():
        append.meta.update(_commute(prover, append, key, readers[append], queries))
    sort_topologically(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()


def _commute(
    prover: Prover,
    append: fx.Node,
    key: _Moved,
    readers: Sequence[fx.Node] | None,
    queries: Mapping[fx.Node, fx.Node],
) -> dict[str, Any]:
    """Move one key's norm and weights; what the append's meta says of it."""
    if readers is None:
        return {UNMOVED: "something else than attention reads the cached key"}
    error, why = _difference(prover, key)
    if why:
        return {UNMOVED: f"with its norm before it, {why}"}
    append.update_arg(0, key.end)
    for attend in readers:
        query = queries[attend.args[0]]  # type: ignore[index]
        attend.update_arg(0, _weighted(query, key.tail.weights))
    return {MOVED: {
        "norm": key.tail.result is not key.tail.source,
        "weights_to_query": [_name(weight) for weight in key.tail.weights],
        "relative_error": error,
        "source": str(source_line(key.tail.result) or ""),
    }}  # fmt: skip


def _readers(append: fx.Node) -> list[fx.Node] | None:
    """The attentions that read an append's key; None if it is read in any other place."""
    keys = [part for part in append.users if part.args[1] == 0]
    readers = {user for key in keys for user in key.users}
    alone = all(u.target is ATTEND and u.all_input_nodes.count(k) == 1 and u.args[1] is k
                for k in keys for u in k.users)  # fmt: skip
    return [u for u in append.graph.nodes if u in readers] if alone else None


def _moved_key(captured: Captured, known: Taint, append: fx.Node) -> _Moved | None:
    key = append.args[0]
    assert isinstance(key, fx.Node)
    try:
        return _moved(captured, known, key)
    except NoTail as reason:
        if rotation_site(key, known).mixed:
            append.meta[UNMOVED] = f"what follows it is no norm that rotations pass: {reason}"
        return None


def _moved(captured: Captured, known: Taint, end: fx.Node) -> _Moved | None:
    """The moved version of a vector; None where nothing behind its rotation is to be moved."""
    site = rotation_site(end, known)
    if not site.mixed:
        return None
    tail = tail_of(end, known)
    turned = None if tail is None else rotation_site(tail.source, known)
    if tail is None or turned is None or not turned.mixed or turned.pre is None:
        return None
    width = float_value(tail.source).shape[-1]
    if float_value(turned.pre).shape[-1] != width or float_value(end).shape[-1] != width:
        return None
    return _Moved(tail, turned.pre, _rebuilt(captured.graph_module.graph, tail, turned.pre))


def _rebuilt(graph: fx.Graph, tail: Tail, pre: fx.Node) -> fx.Node:
    """Norm, rotation and moves in this order, as new nodes, without the weights."""
    turned = tail.source
    if tail.result is not tail.source:
        dtype = float_value(pre).dtype
        start = _cast(graph, pre, float_value(tail.source).dtype, after=tail.end)
        normed = _cast(graph, _copy(graph, tail.source, start, tail.result, tail.weighted), dtype)
        turned = _copy(graph, pre, normed, tail.source)
        turned = _cast(graph, turned, float_value(tail.result).dtype)
    end = _copy(graph, tail.result, turned, tail.end, tail.weighted)
    return _cast(graph, end, float_value(tail.end).dtype)


def _cast(
    graph: fx.Graph, node: fx.Node, dtype: torch.dtype, after: fx.Node | None = None
) -> fx.Node:
    if float_value(node).dtype == dtype and after is None:
        return node
    return add_op(graph, after or node, aten.to.dtype, (node, dtype))


def _copy(
    graph: fx.Graph, source: fx.Node, start: fx.Node, end: fx.Node, weighted: Iterable[fx.Node] = ()
) -> fx.Node:
    """A copy of everything from a source to an end, with another tensor for the source, and
    without the weights of the nodes ``weighted``."""
    copies = {source: start}
    inside, last = between(source, end), start
    for node in [node for node in graph.nodes if node in inside]:
        if node in weighted and op_name(node) == "mul":
            copies[node] = next(copies[i] for i in node.all_input_nodes if i in copies)
            continue
        with graph.inserting_after(last):
            last = graph.node_copy(node, lambda n: copies.get(n, n))
        copies[node] = last
        if node in weighted:  # a norm with weights of its own: (vector, shape, weights, epsilon)
            last.update_arg(2, None)
        if op_name(node) == "type_as":  # of another tensor, on which nothing else depends
            last.target, last.args = aten.to.dtype, (last.args[0], float_value(node).dtype)
    return copies[end]


def _moved_queries(
    captured: Captured, known: Taint, readers: Iterable[Sequence[fx.Node] | None]
) -> dict[fx.Node, _Moved | None]:
    """The queries of some attentions, and what they are with their own norms before RoPE."""
    found: dict[fx.Node, _Moved | None] = {}
    for query in (attend.args[0] for attends in readers for attend in attends or ()):
        assert isinstance(query, fx.Node)
        if query not in found:
            try:
                found[query] = _moved(captured, known, query)
            except NoTail:
                found[query] = None
    return found


def _query(prover: Prover, query: fx.Node, moved: _Moved | None) -> fx.Node:
    """A query with its norm before the rotation, if that is the same."""
    if moved is None or _difference(prover, moved)[1]:
        return query
    return _weighted(moved.end, moved.tail.weights)


def _weighted(query: fx.Node, weights: Iterable[fx.Node]) -> fx.Node:
    """A query times weights, rounded as the model rounds such products."""
    dtype = float_value(query).dtype
    for weight in weights:
        product = add_op(query.graph, query, aten.mul.Tensor, (query, weight))
        query = _cast(query.graph, product, dtype)
    return query


def _difference(prover: Prover, moved: _Moved) -> tuple[float, str]:
    """Relative error of the moved vector, times its weights, against the one that was; and why
    it cannot stand for it, if it cannot.

    Inputs are random, of a different size for every head and token, at positions from 29 on.
    """
    proof = prover.prove(moved.end)
    if proof.spec is None:
        return float("inf"), proof.refusal or "no position reaches it"
    like = float_value(moved.end)
    shape = (_BATCH, int(like.shape[1]), _TOKENS, int(like.shape[3]))
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(*shape[:3], 1, generator=generator) * 4 + 0.25
    x = (torch.randn(shape, generator=generator) * size).to(like.device, like.dtype)
    gm = prover.captured.graph_module
    values = input_values(gm, _START, _TOKENS, _BATCH)
    values[moved.pre] = from_heads(x, proof.layout)
    run = Evaluator(gm, values, widen=prover.captured.dtype)
    with torch.no_grad():
        new = run(moved.end)
        for weight in moved.tail.weights:
            new = new * run(weight)
        old = run(moved.tail.end)
    error = float((new - old).abs().max() / old.abs().max())
    return error, "" if error <= _TOLERANCE else f"keys are others (relative error {error:.1e})"


def _name(node: fx.Node) -> str:
    """The parameter that a constant is computed from; its node's name where it is several."""
    while node.op != "get_attr" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "get_attr" else node.name
