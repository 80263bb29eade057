"""A graph as readable text, and what a pass changed in it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from kvquant_compile.dump.snapshot import GraphView, NodeView

CONTEXT = 2


def graph_lines(graph: GraphView) -> list[str]:
    """Every node on a line of its own, under the module and the line of source it comes from."""
    lines: list[str] = []
    module, source = "", None
    for node in graph.nodes:
        if node.module != module and node.module:
            lines += ["", f"# ---- {node.module}"]
        if node.source is not None and node.source != source:
            lines.append(f"  # {node.source}")
        module, source = node.module or module, node.source or source
        lines.append("    " + node_line(node))
    return lines


def graph_text(graph: GraphView, number: int) -> str:
    """The file of a dump."""
    head = f"# {number:02d} {graph.stage}: {len(graph.nodes)} nodes"
    return "\n".join([head, *graph_lines(graph)]) + "\n"


def node_line(node: NodeView) -> str:
    """``name: type = target(arguments)``."""
    name = f"{node.name}: {node.value}" if node.value else node.name
    if node.op == "output":
        return f"return {node.arguments}"
    if node.op == "placeholder":
        return f"{name} = input {node.target}"
    if node.op == "get_attr":
        return f"{name} = constant {node.target}"
    return f"{name} = {node.target}({node.arguments})"


def changes(before: GraphView, after: GraphView) -> list[str]:
    """A unified diff of nodes, without file headers; empty where a pass changed nothing."""
    old, new = ([node_line(node) for node in graph.nodes] for graph in (before, after))
    diff = difflib.unified_diff(old, new, lineterm="", n=CONTEXT)
    return list(diff)[2:]


def count_changes(diff: Sequence[str]) -> tuple[int, int]:
    """Nodes (removed, added)."""
    return sum(x.startswith("-") for x in diff), sum(x.startswith("+") for x in diff)
