"""Which nodes carry data, which carry positions, and where the two meet on a path.

A *table* is a float tensor that depends on positions or sizes but on no token: cos and sin. The
nodes where a table meets data, on the way from a projection to a cache append, are a rotation;
the last tensor before them that everything comes from is the un-rotated key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvquant_compile.capture.ops import CASTS, VIEWS, op_name

# What is computed by these mixes channels of a whole token: no rotation reaches across them.
_BARRIERS = (
    "aten.linear", "aten.addmm", "aten.mm.", "aten.bmm", "aten.matmul", "aten.einsum",
    "aten.conv", "aten.embedding", "aten.baddbmm", "aten.scaled_dot", "aten._grouped_mm",
    "kvquant_capture.",
)  # fmt: skip
_SPLITS = ("view", "reshape", "unflatten", "_unsafe_view")
# What these give depends on sizes and on nothing else.
_FILLS = frozenset(("zeros", "ones", "empty", "new_zeros", "new_ones", "new_empty",
                    "zeros_like", "ones_like"))  # fmt: skip


@dataclass(frozen=True)
class Taint:
    """Node sets of one graph: ``data`` depends on tokens, ``tables`` on positions only."""

    data: frozenset[fx.Node]
    tables: frozenset[fx.Node]
    order: dict[fx.Node, int]


@dataclass(frozen=True)
class Site:
    """The part of a path in which positions meet data.

    Attributes:
        pre: the tensor it starts from; None when there is no single one.
        mixed: whether positions meet data at all.
    """

    pre: fx.Node | None
    mixed: bool


def carries_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor or a sequence with one."""
    value = node.meta.get("val")
    items: Iterable[Any] = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(item, Tensor) for item in items)


def is_barrier(node: fx.Node) -> bool:
    """Whether a node ends the search for a rotation."""
    return node.op in ("placeholder", "call_module") or str(node.target).startswith(_BARRIERS)


def taint(graph: fx.Graph, *data_inputs: fx.Node) -> Taint:
    """Taint a captured graph; sizes of tensors carry positions, never data."""
    data = set(data_inputs)
    reached = set(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if any(i in reached for i in inputs) and op_name(node) not in _FILLS:
            reached.add(node)
        if carries_tensor(node) and any(i in data for i in inputs):
            data.add(node)
    tables = {node for node in reached - data if _is_float(node) and node.op != "placeholder"}
    return Taint(frozenset(data), frozenset(tables), {n: i for i, n in enumerate(graph.nodes)})


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def rotation_site(end: fx.Node, known: Taint) -> Site:
    """Find where positions enter between the last projection and ``end``."""
    region = _region(end, known)
    mixing = {n for n in region if not is_barrier(n) and set(n.all_input_nodes) & known.tables}
    if not mixing:
        return Site(end, mixed=False)
    affected = set(mixing)
    for node in sorted(region, key=known.order.__getitem__):
        if not is_barrier(node) and set(node.all_input_nodes) & affected:
            affected.add(node)
    frontier = {i for n in affected for i in n.all_input_nodes if i in region} - affected
    candidates = [n for n in region - affected if isinstance(n.meta.get("val"), Tensor)]
    for candidate in sorted(candidates, key=known.order.__getitem__, reverse=True):
        if all(_comes_from(node, candidate, region) for node in frontier):
            return Site(_before_casts(candidate), mixed=True)
    return Site(None, mixed=True)


def _before_casts(node: fx.Node) -> fx.Node:
    """A key cast to float32, or split into complex pairs, only for its rotation is stored as it was
    before that."""
    while node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        cast = op_name(node) in CASTS and len(node.all_input_nodes) == 1
        if cast and float_value(source).dtype.itemsize > float_value(node).dtype.itemsize:
            break
        split = op_name(node) in _SPLITS and float_value(node).ndim == 5
        if not (cast or op_name(node) == "view_as_complex" or split):
            break
        node = source
    return node


def _region(end: fx.Node, known: Taint) -> set[fx.Node]:
    """Data nodes backward from ``end``, up to and including the barriers."""
    region: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node in region or node not in known.data:
            continue
        region.add(node)
        if not is_barrier(node):
            pending += node.all_input_nodes
    return region


def _comes_from(node: fx.Node, source: fx.Node, region: set[fx.Node]) -> bool:
    """Whether every data path into ``node`` starts at ``source``."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current is source or current in seen:
            continue
        seen.add(current)
        inputs = [i for i in current.all_input_nodes if i in region]
        if is_barrier(current) or not inputs:
            return False
        pending += inputs
    return True


def float_value(node: fx.Node) -> torch.Tensor:
    """The fake tensor that stands for a node's value."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def without_factors(end: fx.Node, known: Taint) -> fx.Node:
    """What a tensor is before its products with tables of one number per token, and with
    constants of one number per channel.

    Casts are walked over only on the way to such a product: without one, the tensor itself is
    returned, whose dtype says how exactly the rotation was computed.
    """
    node, found = end, end
    while node.op == "call_function":
        inputs = node.all_input_nodes
        if op_name(node) in CASTS and len(inputs) == 1 and inputs[0] in known.data:
            node = inputs[0]
            continue
        factors = [i for i in inputs if is_per_token(i, known) or per_channel(i, known, node)]
        others = [i for i in inputs if i not in factors]
        single = op_name(node) == "mul" and len(factors) == len(others) == 1
        if not single or others[0] not in known.data:
            break
        node = found = others[0]
    return found


def is_per_token(node: fx.Node, known: Taint) -> bool:
    """Whether a node is a table of one number for every token."""
    return node in known.tables and float_value(node).shape[-1] == 1


def per_channel(node: fx.Node, known: Taint, like: fx.Node) -> bool:
    """Whether a node is a constant with one number for every channel of ``like``'s last axis."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or node in known.data or node in known.tables:
        return False
    shape = list(value.shape)
    return bool(shape) and shape == [1] * (len(shape) - 1) + [float_value(like).shape[-1]]


def writer_in_place(end: fx.Node, known: Taint) -> fx.Node | None:
    """An in-place operation on what a tensor is made of, between the last projection and it; or
    None. What it writes is no input of what reads the result, so that no path leads there."""
    pending, seen = [end], {end}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.op == "call_function" and _writes(user, node):
                return user
        views = [user for user in node.users if op_name(user) in VIEWS]
        before = [] if is_barrier(node) else node.all_input_nodes
        new = [n for n in (*views, *before) if n not in seen and carries_tensor(n)]
        new = [n for n in new if n not in known.tables]
        pending += new
        seen.update(new)
    return None


def _writes(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operation changes its first argument, and that is the node."""
    name = op_name(user)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place and bool(user.args) and user.args[0] is node
