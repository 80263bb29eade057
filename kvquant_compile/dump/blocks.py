"""Small pictures of a big graph: one per decoder block, modules that no pass touched as one box.

A block is what the model calls a layer, by the path of the module that its attention is traced
in. What lies outside is drawn only where the block reads it.
"""

from __future__ import annotations

import graphlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvquant_compile.capture.markers import NAMESPACE
from kvquant_compile.dump.roles import APPEND, ATTEND, CONSTANTS, MASKS, PAGES, STEP, Role
from kvquant_compile.dump.snapshot import GraphView, NodeView

_LAYER = re.compile(r"^(.*?\.\d+)(\.|$)")
_TYPE = re.compile(r"\w+\[[^\]]*\]")
_FORMAT = re.compile(r"'(\S+ [^']*?) heads")
_LITERAL = re.compile(r"(?<![\w.])-?\d[\d.e-]*(?![\w.])|'[^']*'")
_SHARED = {CONSTANTS: "calibrated tables", PAGES: "packed pages", STEP: "step"}
_NAMED = 2  # parts of a box that are named in it


@dataclass(frozen=True)
class Box:
    """One box of a picture.

    Attributes:
        key: what it is called in other graphs as well.
        title, subtitle: what stands in it.
        role: colours it; None for what no pass touched.
        members: the nodes it stands for.
        inputs: keys of the boxes it reads.
        outside: whether it lies outside the block.
    """

    key: str
    title: str
    subtitle: str
    role: Role | None
    members: tuple[NodeView, ...]
    inputs: tuple[str, ...]
    outside: bool

    @property
    def shape(self) -> tuple[object, ...]:
        """What it looks like whichever block it is in."""
        kind = self.role.kind if self.role else ""
        if self.outside:
            return kind, "outside"
        ops = [m for m in self.members if m.op != "get_attr"]
        settings = [_LITERAL.findall(m.arguments) for m in ops if m.target.startswith("kvquant.")]
        return kind, tuple(m.target for m in ops), str(settings)


def block_of(node: NodeView) -> str:
    """The path of the block that a node is traced in; empty where it is in none."""
    found = _LAYER.match(node.module)
    return found[1] if found else ""


def attending_blocks(graph: GraphView, roles: Mapping[str, Role]) -> dict[str, list[int]]:
    """Block -> cache layers that it appends to or attends to, in graph order."""
    blocks: dict[str, list[int]] = {}
    for node in graph.nodes:
        role = roles.get(node.name)
        if role is not None and role.kind in (APPEND, ATTEND) and role.layer is not None:
            layers = blocks.setdefault(block_of(node), [])
            if role.layer not in layers:
                layers.append(role.layer)
    return blocks


def picture(graph: GraphView, roles: Mapping[str, Role], block: str) -> list[Box]:
    """The boxes of one block, inputs first."""
    shown = [node for node in graph.nodes if _is_shown(node, roles)]
    own = [node for node in shown if block_of(node) == block]
    inside = {node.name for node in own if not _is_shared(node, roles)}
    read = {name for node in shown if node.name in inside for name in node.inputs}
    members = [node for node in shown if node.name in inside or node.name in read]
    keys = _keys(members, inside, roles, block)
    boxes = _boxes(members, keys, inside, roles)
    try:
        return _sorted(boxes)
    except graphlib.CycleError:  # modules that call each other in turns: nothing is folded
        return _sorted(_boxes(members, {m.name: m.name for m in members}, inside, roles))


def _is_shown(node: NodeView, roles: Mapping[str, Role]) -> bool:
    """Tensors, without parameters and sizes."""
    if node.op == "output":
        return False
    if node.name in roles:
        return True
    if node.op == "get_attr" or not node.tensor:
        return False
    return not node.target.startswith(("aten.sym_size", "aten.sym_numel"))


def _is_shared(node: NodeView, roles: Mapping[str, Role]) -> bool:
    return node.name in roles and roles[node.name].kind in _SHARED


def _keys(
    members: Iterable[NodeView], inside: set[str], roles: Mapping[str, Role], block: str
) -> dict[str, str]:
    """Node -> its box."""
    members = list(members)
    touched = {
        path
        for node in members
        if node.name in inside and node.name in roles
        for path in _prefixes(node.module)
    }
    keys = {}
    for node in members:
        role = roles.get(node.name)
        if role is not None and role.kind in _SHARED:
            keys[node.name] = role.kind
        elif node.name not in inside:
            keys[node.name] = node.name if role == Role(MASKS) else node.module or node.name
        elif role is None:
            free = [path for path in _prefixes(node.module) if path not in touched]
            keys[node.name] = free[0] if free and free[0] != block else node.name
        else:
            keys[node.name] = node.name
    return keys | {n.name: keys[n.inputs[0]] for n in members
                   if n.target == "getitem" and n.inputs and n.inputs[0] in keys}  # fmt: skip


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))] if module else []


def _boxes(
    members: list[NodeView], keys: Mapping[str, str], inside: set[str], roles: Mapping[str, Role]
) -> dict[str, Box]:
    grouped: dict[str, list[NodeView]] = {}
    for node in members:
        grouped.setdefault(keys[node.name], []).append(node)
    boxes = {}
    for key, nodes in grouped.items():
        own = any(node.name in inside for node in nodes)
        inputs = dict.fromkeys(
            keys[name] for node in nodes if own for name in node.inputs if name in keys
        )
        inputs.pop(key, None)
        role = next((roles[n.name] for n in nodes if n.name in roles), None)
        title, subtitle = _words(key, nodes, role)
        boxes[key] = Box(key, title, subtitle, role, tuple(nodes), tuple(inputs), not own)
    return boxes


def _words(key: str, nodes: list[NodeView], role: Role | None) -> tuple[str, str]:
    first, last = nodes[0], nodes[-1]
    if role is not None and role.kind in _SHARED:
        parts = [node.target.split("_", 2)[-1] if role.kind == CONSTANTS else node.target
                 for node in nodes]  # fmt: skip
        more = f" + {len(parts) - _NAMED}" if len(parts) > _NAMED else ""
        return _SHARED[role.kind], ", ".join(parts[:_NAMED]) + more
    real = [node for node in nodes if node.target != "getitem"] or nodes
    if role is not None and role.kind in (APPEND, ATTEND) and _FORMAT.search(first.arguments):
        return _short(first.target), str(_FORMAT.search(first.arguments)[1])  # type: ignore[index]
    count = f"{len(real)} ops" if len(real) > 1 else _short(real[0].target)
    value = _type(last if len(real) > 1 else first)
    if key in (node.name for node in nodes):
        return count, value
    path = key.split(".")
    title = ".".join(path[-2:]) if path[-1].isdigit() else path[-1]
    return title, " · ".join(x for x in (count, value) if x)


def _type(node: NodeView) -> str:
    """The type of a value, or of the first of several."""
    found = _TYPE.search(node.value)
    return found[0] if found else ""


def _short(target: str) -> str:
    """``aten.mul.Tensor`` -> ``mul``; our own ops keep their namespace, markers are named."""
    parts = target.split(".")
    if parts[0] == "aten" and len(parts) > 1:
        return parts[1]
    if parts[0] == NAMESPACE:
        return f"{parts[1]} (marker)"
    return "::".join(parts[:2]) if parts[0] == "kvquant" else target


def _sorted(boxes: Mapping[str, Box]) -> list[Box]:
    """Inputs first, otherwise in graph order."""
    sorter = graphlib.TopologicalSorter({key: box.inputs for key, box in boxes.items()})
    sorter.prepare()
    rank = {key: place for place, key in enumerate(boxes)}
    ready, order = list(sorter.get_ready()), []
    while ready:
        ready.sort(key=rank.__getitem__)
        order.append(ready.pop(0))
        sorter.done(order[-1])
        ready += sorter.get_ready()
    return [boxes[key] for key in order]
