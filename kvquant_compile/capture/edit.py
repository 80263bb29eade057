"""Small edits of FX graphs that keep ``meta["val"]`` in step."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

SIZE = torch.ops.aten.sym_size.int


def add_call(graph: fx.Graph, after: fx.Node, op: Any, args: tuple[Any, ...], val: Any) -> fx.Node:
    """Insert a call right after a node, with its fake value and that node's source lines."""
    with graph.inserting_after(after):
        node = graph.call_function(op, args)
    node.meta["val"] = val
    if "stack_trace" in after.meta:
        node.meta["stack_trace"] = after.meta["stack_trace"]
    return node


def add_op(graph: fx.Graph, after: fx.Node, op: Any, args: tuple[Any, ...]) -> fx.Node:
    """Insert a call after a node; its fake value comes from running it on its inputs' fakes."""
    fakes = fx.node.map_arg(args, lambda n: n.meta["val"])
    return add_call(graph, after, op, args, op(*fakes))


def add_transpose(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``node.transpose(1, 2)``, right after it."""
    op = torch.ops.aten.transpose.int
    return add_call(graph, node, op, (node, 1, 2), node.meta["val"].transpose(1, 2))


def later(graph: fx.Graph, *nodes: fx.Node) -> fx.Node:
    """The last of some nodes in graph order."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    return max(nodes, key=order.__getitem__)


def sort_topologically(graph: fx.Graph) -> None:
    """Move nodes so that inputs precede users again, otherwise keeping the order."""
    done: set[fx.Node] = set()
    for node in list(graph.nodes):
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [i for i in current.all_input_nodes if i not in done]
            if missing and current not in done:
                pending += missing
                continue
            pending.pop()
            if current not in done:
                done.add(current)
                graph.output_node().prepend(current) if current.op != "output" else None
