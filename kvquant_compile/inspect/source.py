"""The generated kernels of an optimised model's layers, read off the graph that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.lowering import ops
from kvquant_compile.lowering.attend import Site
from kvquant_compile.lowering.source import kernels_source, language, no_source
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.runtime.program import Program

# Places among the arguments of kvquant::attend.
_PAGES, _TABLES, _GEOMETRY, _SCALE, _SOFTCAP, _WINDOW = 7, 9, 10, 12, 13, 14


@dataclass(frozen=True)
class LayerSource:
    """Generated kernels of one layer for a decode step of one token a sequence.

    Attributes:
        index: cache index.
        kernels: name -> source text.
        reason: why there are none; empty where there are.
    """

    index: int
    kernels: Mapping[str, str]
    reason: str

    def __str__(self) -> str:
        if self.reason:
            return f"# layer {self.index}: no generated kernel: {self.reason}\n"
        return "\n".join(f"{self.heading(name)}\n{text}" for name, text in self.kernels.items())

    def heading(self, name: str) -> str:
        """A comment above one of the kernels."""
        mark = "//" if language(self.kernels[name]) == "cpp" else "#"
        return f"{mark} layer {self.index}: {name}"


def layer_source(program: Program, layer: MatchedLayer) -> LayerSource:
    """The generated kernels of a layer; every attention site that reads it may have its own."""
    index = layer.plan.index
    layout = program.layouts[program.indices.index(index)]
    reason = no_source(layout, program.device)
    if reason or not isinstance(layout, PageLayout):
        return LayerSource(index, {}, reason)
    kernels: dict[str, str] = {}
    graph_module = program.graph_module
    nodes = graph_module.graph.find_nodes(op="call_function", target=ops.attend)
    sites = [n for n in nodes if getattr(n.args[_PAGES], "target", "") == f"pages_{index}"]
    for node, plan in zip(sites, layer.plan.attends, strict=True):
        site = Site(node.args[_SCALE], node.args[_SOFTCAP], node.args[_WINDOW], None)
        tables, geometry = (_constants(graph_module, node.args[i]) for i in (_TABLES, _GEOMETRY))
        columns = plan.query_heads // layer.plan.kv_heads
        kernels |= kernels_source(layout, tables, geometry, site, columns)
    return LayerSource(index, kernels, "")


def _constants(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[Tensor]:
    return [getattr(graph_module, str(node.target)) for node in nodes]
