"""Positions of a step from the device, where a hand-written decoder counts them on the host.

``arange(past, past + S)`` becomes the slots of the first row: a functional decoder knows no
padding, so that a token's slot is its position, in every row. What is left of ``past`` then dies,
and nothing in the graph changes from one decode step to the next.
"""

from __future__ import annotations

import operator

import torch
from torch import fx


def positions_from_slots(graph: fx.Graph, slots: fx.Node) -> None:
    """Replace every ``arange`` over a step's columns by ``slots`` int32 [B, S], row 0."""
    past = next((n for n in graph.find_nodes(op="placeholder") if n.target == "past"), None)
    if past is None:
        return
    for node in list(past.users):
        if node.target is torch.ops.aten.arange.start and _spans_step(node, past):
            with graph.inserting_before(node):
                row = graph.call_function(torch.ops.aten.select.int, (slots, 0, 0))
                dtype = node.kwargs.get("dtype") or torch.int64
                new = graph.call_function(torch.ops.aten.to.dtype, (row, dtype))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _spans_step(node: fx.Node, past: fx.Node) -> bool:
    """Whether a node's first two arguments are ``past`` and ``past + ids.shape[1]``."""
    start, end = node.args[:2]
    if start is not past or not isinstance(end, fx.Node) or end.target is not operator.add:
        return False
    sizes = [argument for argument in end.args if argument is not past]
    return len(sizes) == 1 and isinstance(sizes[0], fx.Node) and _is_step_size(sizes[0])


def _is_step_size(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.sym_size.int:
        return False
    source, dim = node.args
    return isinstance(source, fx.Node) and (source.target, dim) == ("ids", 1)
