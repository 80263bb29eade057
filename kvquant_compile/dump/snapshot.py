"""A graph as it is at one moment, as plain data: what is written and drawn of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvquant_compile.capture.run import attribute
from kvquant_compile.capture.source_lines import SourceLine, source_line
from kvquant_compile.passes.rewrite import REPLACES

_SHORT = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "complex64": "c64",
    "int64": "i64", "int32": "i32", "uint8": "u8", "int8": "i8",
}  # fmt: skip


@dataclass(frozen=True)
class NodeView:
    """One node.

    Attributes:
        name: of the node; unique in its graph, and kept by the passes that do not change it.
        op: fx's kind of node.
        target: what is called, or read, shortened: ``aten.mul.Tensor``.
        arguments: as they are printed.
        inputs: names of the nodes it reads.
        value: type and shape, ``f32[B, S, 64]``; empty where it is not known.
        tensor: whether it is known to be a tensor (sizes and constants are not).
        module: path of the module that it belongs to.
        source: line of the model; None for what no line says.
        replaces: name of the marker that it stands for; empty for all but ops of the rewrite.
    """

    name: str
    op: str
    target: str
    arguments: str
    inputs: tuple[str, ...]
    value: str
    tensor: bool
    module: str
    source: SourceLine | None
    replaces: str


@dataclass(frozen=True)
class GraphView:
    """A graph after one pass.

    Attributes:
        stage: what the pass did.
        nodes: in graph order.
    """

    stage: str
    nodes: tuple[NodeView, ...]

    def __repr__(self) -> str:
        return f"GraphView({self.stage}, {len(self.nodes)} nodes)"


def snapshot(stage: str, gm: fx.GraphModule) -> GraphView:
    """What a graph is now."""
    sizes = _size_names(gm.graph)
    modules = _modules(gm.graph)
    return GraphView(
        stage, tuple(_view(gm, node, sizes, modules.get(node, "")) for node in gm.graph.nodes)
    )


def _view(gm: fx.GraphModule, node: fx.Node, sizes: Mapping[str, str], module: str) -> NodeView:
    value = node.meta.get("val")
    if node.op == "get_attr" and value is None:
        value = attribute(gm, str(node.target))
    return NodeView(
        name=node.name,
        op=node.op,
        target=_target(node),
        arguments=", ".join(
            [_argument(a) for a in node.args]
            + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
        ),
        inputs=tuple(source.name for source in node.all_input_nodes),
        value=_type(value, sizes),
        tensor=isinstance(value, Tensor | tuple | list) or value is None,
        module=module,
        source=source_line(node),
        replaces=str(node.meta.get(REPLACES, "")),
    )


def _modules(graph: fx.Graph) -> dict[fx.Node, str]:
    """Paths of the modules that nodes were traced in; what a pass added is where its inputs are."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inputs = [source for source in node.all_input_nodes if source in found]
        if stack:
            found[node] = str(stack[-1][0])
        elif inputs and node.op == "call_function":
            found[node] = found[max(inputs, key=order.__getitem__)]
    return found


def _target(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr", "call_module", "output"):
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return repr(value) if isinstance(value, str) else str(value).removeprefix("torch.")


def _type(value: Any, sizes: Mapping[str, str]) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_type(v, sizes) for v in value)
    if not isinstance(value, Tensor):
        return ""
    dtype = str(value.dtype).removeprefix("torch.")
    shape = ", ".join(sizes.get(str(size), str(size)) for size in value.shape)
    return f"{_SHORT.get(dtype, dtype)}[{shape}]"


def _size_names(graph: fx.Graph) -> dict[str, str]:
    """The tracer's symbols for batch and new tokens -> B and S."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.target in ("hidden", "ids") and isinstance(value, Tensor):
            return dict(zip(map(str, value.shape[:2]), ("B", "S"), strict=True))
    return {}
