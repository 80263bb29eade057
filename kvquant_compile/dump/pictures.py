"""A whole graph as one SVG file: every decoder block, one under the other."""

from __future__ import annotations

from collections.abc import Mapping

from kvquant_compile.dump.blocks import block_of, picture
from kvquant_compile.dump.roles import Role
from kvquant_compile.dump.snapshot import GraphView
from kvquant_compile.dump.svg import stacked


def whole_graph(graph: GraphView, roles: Mapping[str, Role]) -> str:
    """SVG text with its own colours."""
    blocks = dict.fromkeys(block_of(node) for node in graph.nodes if node.module)
    found = [(block or "outside the blocks", picture(graph, roles, block)) for block in blocks]
    return str(stacked(graph.stage, [(name, boxes) for name, boxes in found if boxes]))
