"""Positions of a step from the device, where a hand-written decoder counts them on the host.

A functional decoder knows no padding, so that a token's slot is its position, in every row:
``arange(past, past + S)`` becomes the slots of the first row, and ``table[past : past + S]`` the
table's rows of these. What is left of ``past`` then dies, and nothing in the graph changes from
one decode step to the next.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

# In a graph module's ``meta``: columns that its tables have rows for.
COLUMNS = "kvquant_columns"


def positions_from_slots(gm: fx.GraphModule, slots: fx.Node) -> None:
    """Replace what spans a step's columns by ``slots`` int32 [B, S], row 0.

    The shortest table bounds the columns, which is left in ``gm.meta``: a slice beyond a table
    fails on the host, but a gather would not be noticed there.
    """
    graph = gm.graph
    past = next((n for n in graph.find_nodes(op="placeholder") if n.target == "past"), None)
    if past is None:
        return
    bounds = []
    for node in list(past.users):
        arange = node.target is torch.ops.aten.arange.start and _spans_step(node.args[:2], past)
        table = None if arange else _sliced_table(gm, node, past)
        if not arange and table is None:
            continue
        with graph.inserting_before(node):
            row = graph.call_function(torch.ops.aten.select.int, (slots, 0, 0))
            if table is None:
                dtype = node.kwargs.get("dtype") or torch.int64
                new = graph.call_function(torch.ops.aten.to.dtype, (row, dtype))
            else:
                lookup = (node.args[0], node.args[1], row)
                new = graph.call_function(torch.ops.aten.index_select.default, lookup)
                bounds.append(table.shape[int(node.args[1])])
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    if bounds:
        gm.meta[COLUMNS] = min(bounds)


def _sliced_table(gm: fx.GraphModule, node: fx.Node, past: fx.Node) -> torch.Tensor | None:
    """The model's own tensor of which a node takes the step's columns."""
    if node.target is not torch.ops.aten.slice.Tensor or not _spans_step(node.args[2:], past):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    table: torch.Tensor = operator.attrgetter(str(source.target))(gm)
    return table


def _spans_step(bounds: tuple[Any, ...], past: fx.Node) -> bool:
    """Whether (start, end) are ``past`` and ``past + S``, without a stride."""
    if len(bounds) != 2 or bounds[0] is not past or not isinstance(bounds[1], fx.Node):
        return False
    end = bounds[1]
    sizes = [argument for argument in end.args if argument is not past]
    return end.target is operator.add and len(sizes) == 1 and _is_step_size(sizes[0])


def _is_step_size(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten.sym_size.int:
        return False
    source, dim = node.args
    return isinstance(source, fx.Node) and (source.target, dim) == ("ids", 1)
