"""What the passes made of each node: the parts of a graph that pictures colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.markers import MASK
from kvquant_compile.dump.snapshot import GraphView
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.passes.rewrite import CONSTANT_PREFIX, STEP_INPUTS
from kvquant_compile.passes.taint import Taint, rotation_site, taint

KEY, VALUE = "key", "value"
KEY_ROTATION, QUERY_ROTATION = "key-rotation", "query-rotation"
TABLES, MASKS, APPEND, ATTEND = "position-tables", "mask", "append", "attend"
CONSTANTS, PAGES, STEP = "calibrated-tables", "pages", "step"

MEANING = {
    KEY: "un-rotated key: what is stored",
    KEY_ROTATION: "key's rotation: proved; cached keys are rotated on reading instead",
    QUERY_ROTATION: "query's rotation: proved to turn with the key",
    TABLES: "cosine and sine tables",
    VALUE: "value",
    MASKS: "attention mask",
    APPEND: "append to the cache",
    ATTEND: "attention",
    CONSTANTS: "calibrated tables",
    PAGES: "packed pages",
    STEP: "slots, positions and lengths of the step",
}


@dataclass(frozen=True)
class Role:
    """What a node is to a cache layer.

    Attributes:
        kind: one of :data:`MEANING`.
        layer: the cache index; None for what all layers share.
    """

    kind: str
    layer: int | None = None


def captured_roles(captured: Captured, layers: Sequence[MatchedLayer]) -> dict[str, Role]:
    """Roles by node name in a captured graph, and in every later one for nodes that it keeps."""
    known = taint(captured.graph_module.graph, *captured.data_inputs)
    roles = {node.name: Role(TABLES) for node in known.tables}
    for node in captured.graph_module.graph.find_nodes(op="call_function", target=MASK):
        roles[node.name] = Role(MASKS)
    for layer in layers:
        index = layer.plan.index
        for attend in layer.attends:
            turned = _rotation(attend.all_input_nodes[0], known)
            roles |= dict.fromkeys(turned, Role(QUERY_ROTATION, index))
            roles[attend.name] = Role(ATTEND, index)
        roles |= dict.fromkeys(_rotation(layer.key, known), Role(KEY_ROTATION, index))
        roles[layer.key_pre.name] = Role(KEY, index)
        roles[layer.value.name] = Role(VALUE, index)
        roles[layer.append.name] = Role(APPEND, index)
    return roles


def rewritten_roles(graph: GraphView, before: Mapping[str, Role]) -> dict[str, Role]:
    """Roles by node name in a rewritten graph, given those of the captured one."""
    roles: dict[str, Role] = {}
    for node in graph.nodes:
        kind, _, index = node.target.partition("_")
        if node.replaces and node.replaces in before:
            roles[node.name] = before[node.replaces]
        elif node.op == "placeholder" and kind in ("pages", "sinks") and index.isdigit():
            roles[node.name] = Role(PAGES, int(index))
        elif node.op == "placeholder" and node.target in STEP_INPUTS:
            roles[node.name] = Role(STEP)
        elif node.op == "get_attr" and node.target.startswith(CONSTANT_PREFIX):
            digits = node.target.removeprefix(CONSTANT_PREFIX).split("_")[0]
            roles[node.name] = Role(CONSTANTS, int(digits) if digits.isdigit() else None)
        elif node.name in before:
            roles[node.name] = before[node.name]
    return roles


def between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on paths from ``start`` to ``end``, ``end`` included, ``start`` not."""
    found: set[fx.Node] = set()
    reaches: dict[fx.Node, bool] = {start: True}
    pending = [end]
    while pending:
        node = pending[-1]
        if node in reaches:
            pending.pop()
            continue
        missing = [i for i in node.all_input_nodes if i not in reaches]
        if missing:
            pending += missing
            continue
        reaches[pending.pop()] = any(reaches[i] for i in node.all_input_nodes)
    pending = [end] if end is not start else []
    while pending:
        node = pending.pop()
        if node is start or node in found or not reaches[node]:
            continue
        found.add(node)
        pending += node.all_input_nodes
    return found


def _rotation(end: fx.Node, known: Taint) -> list[str]:
    """Names of the nodes that positions take part in, up to ``end``."""
    site = rotation_site(end, known)
    if site.pre is None or not site.mixed:
        return []
    return [node.name for node in between(site.pre, end)]
