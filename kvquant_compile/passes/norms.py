"""Norms of a head vector behind its rotation: done before it instead, where that is the same.

A root-mean-square norm multiplies by a number that depends on the vector's length only, which no
rotation changes: N(R x) = R N(x). Llama 4 and nanochat have such norms. Weights, one per channel,
do not pass through a rotation: keys with those (Hunyuan's) stay where they are. What a norm does is
found by evaluating it, and the moved one is proved and validated like any other key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.edit import add_op, sort_topologically
from kvquant_compile.capture.markers import APPEND, ATTEND
from kvquant_compile.capture.ops import CARRIES, op_name
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.passes.prove import Prover
from kvquant_compile.passes.taint import Taint, float_value, is_barrier, rotation_site, taint

_SQUARES = ("pow", "square", "rms_norm", "_fused_rms_norm", "linalg_vector_norm")
_TOLERANCE = 1e-4
# Nodes among which its squares are looked for.
_NEAR = 64
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm without weights over the last axis; it maps ``source`` to ``result``."""

    source: fx.Node
    result: fx.Node


def commute_norms(captured: Captured) -> None:
    """Move the norms behind the rotations of keys, and of their queries, before them.

    Only where the moved key has a proved rotation; other keys stay as they are.
    """
    gm = captured.graph_module
    moved = [_commute(captured, append) for append in gm.graph.find_nodes(
        op="call_function", target=APPEND)]  # fmt: skip
    if any(moved):
        gm.graph.eliminate_dead_code()
        sort_topologically(gm.graph)
        gm.graph.lint()
        gm.recompile()


def _commute(captured: Captured, append: fx.Node) -> bool:
    gm, key = captured.graph_module, append.args[0]
    assert isinstance(key, fx.Node)
    known = taint(gm.graph, *captured.data_inputs)
    found = _moved(captured, known, key)
    if found is None or Prover(captured).prove(found).spec is None:
        return False
    readers = set(append.users)
    append.update_arg(0, found)
    for attend in gm.graph.find_nodes(op="call_function", target=ATTEND):
        query = attend.args[0]
        assert isinstance(query, fx.Node)
        if attend.args[1] in readers:
            attend.update_arg(0, _moved(captured, known, query) or query)
    return True


def _moved(captured: Captured, known: Taint, end: fx.Node) -> fx.Node | None:
    """A rotated vector with its norm before the rotation; None where it has no such norm."""
    norm = norm_behind(captured, end)
    site = None if norm is None else rotation_site(norm.source, known)
    if norm is None or site is None or not site.mixed or site.pre is None:
        return None
    width = float_value(norm.source).shape[-1]
    if float_value(site.pre).shape[-1] != width or float_value(end).shape[-1] != width:
        return None
    gm, dtype = captured.graph_module, float_value(site.pre).dtype
    start = _cast(gm.graph, site.pre, float_value(norm.source).dtype, after=end)
    normed = _copy(gm.graph, norm.source, start, norm.result)
    normed = _cast(gm.graph, normed, dtype)
    turned = _copy(gm.graph, site.pre, normed, norm.source)
    turned = _cast(gm.graph, turned, float_value(norm.result).dtype)
    return _copy(gm.graph, norm.result, turned, end)


def _cast(
    graph: fx.Graph, node: fx.Node, dtype: torch.dtype, after: fx.Node | None = None
) -> fx.Node:
    if float_value(node).dtype == dtype and after is None:
        return node
    return add_op(graph, after or node, aten.to.dtype, (node, dtype))


def _copy(graph: fx.Graph, source: fx.Node, start: fx.Node, end: fx.Node) -> fx.Node:
    """A copy of everything from a source to an end, with another tensor for the source."""
    copies = {source: start}
    order = [node for node in graph.nodes if node is not start]
    inside = _between(source, end)
    last = start
    for node in order:
        if node in inside:
            with graph.inserting_after(last):
                last = graph.node_copy(node, lambda n: copies.get(n, n))
            copies[node] = last
            if op_name(node) == "type_as":  # of another tensor, on which nothing else depends
                last.target, last.args = aten.to.dtype, (last.args[0], float_value(node).dtype)
    return copies[end]


def _between(source: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on a way from one node to another, the latter included."""
    after, pending = {source}, [source]
    while pending:
        new = [user for user in pending.pop().users if user not in after]
        after.update(new)
        pending += new
    found, pending = set(), [end]
    while pending:
        node = pending.pop()
        if node in after and node is not source and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def norm_behind(captured: Captured, end: fx.Node) -> Norm | None:
    """The norm whose result a tensor is, moved or cast, if rotations pass through it."""
    result = end
    while result.op == "call_function" and op_name(result) in CARRIES:
        result = result.all_input_nodes[0]
    source = _squared(result)
    if source is None:
        return None
    x = _random(source)
    here = _factors(captured, source, result, x)
    turned = _factors(captured, source, result, x @ _orthogonal(x))
    if here is None or turned is None:
        return None
    length = here[..., :1]
    return Norm(source, result) if _close(here, length) and _close(turned, length) else None


def _squared(result: fx.Node) -> fx.Node | None:
    """The vector of which a result has the squares, close before it."""
    pending, seen = [result], {result}
    while pending and len(seen) < _NEAR:
        node = pending.pop(0)
        if node.op != "call_function" or is_barrier(node):
            continue
        if op_name(node) in _SQUARES:
            return node.all_input_nodes[0]
        pending += [i for i in node.all_input_nodes if i not in seen]
        seen.update(node.all_input_nodes)
    return None


def _random(node: fx.Node) -> Tensor:
    """Values for a node, of a different length for every head and token."""
    fake = float_value(node)
    sizes = [s if isinstance(s, int) else 2 + 3 * (i > 0) for i, s in enumerate(fake.shape)]
    generator = torch.Generator().manual_seed(0)
    length = torch.rand(*sizes[:-1], 1, generator=generator) * 4 + 0.25
    return (torch.randn(sizes, generator=generator) * length).to(fake.device)


def _orthogonal(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(x.shape[-1], x.shape[-1], dtype=torch.float64, generator=generator)
    return torch.linalg.qr(matrix).Q.to(x)


def _factors(captured: Captured, source: fx.Node, result: fx.Node, x: Tensor) -> Tensor | None:
    """What every element is multiplied by; None where that cannot be evaluated."""
    try:
        with torch.no_grad():
            y = Evaluator(captured.graph_module, {source: x}, widen=True)(result)
    except (KeyError, RuntimeError):  # it needs more than the vector
        return None
    return (y / x).float() if y.shape == x.shape else None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= _TOLERANCE * b.abs()).all())
