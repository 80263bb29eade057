"""The rewrite: every marker of a captured graph becomes a ``kvquant`` op on packed pages.

``append(k, v)`` becomes ``kvquant::append`` of the key *before* its rotation, and every
``attend`` that reads it becomes ``kvquant::attend``. The masks and the full-length keys and
values between them die. The calibrated tables enter the graph as constants.

The rewritten graph keeps the captured placeholders that it still needs and takes, after them,
:data:`STEP_INPUTS` (one per step, shared by all layers) and for every layer ``pages_i`` (list of
slabs) and ``sinks_i``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from kvquant_compile.capture.markers import MARKERS, MASK
from kvquant_compile.capture.reference import step_mask
from kvquant_compile.logs import logger
from kvquant_compile.lowering import ops
from kvquant_compile.lowering.constants import LayerConstants
from kvquant_compile.lowering.selection import selected_slots
from kvquant_compile.observer import SILENT, Observer
from kvquant_compile.passes.device_past import positions_from_slots
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.plan import AttendPlan

STEP_INPUTS = ("slots", "history", "table", "positions", "exact_chunk", "slot_columns")
# Names of the buffers that hold calibrated constants.
CONSTANT_PREFIX = "kvquant_"
# In the meta of an op of the rewritten graph: the name of the marker that it stands for.
REPLACES = "kvquant_replaces"
_GEOMETRY = ("key_order", "query_order", "frequencies", "rope_scale")

_log = logger("passes")


def rewrite(
    source: fx.GraphModule,
    layers: Sequence[MatchedLayer],
    constants: Mapping[int, LayerConstants],
    observer: Observer = SILENT,
) -> fx.GraphModule:
    """A new graph on packed pages; ``source`` stays as it is, parameters are shared.

    Args:
        source: a captured graph with markers.
        layers: what the passes proved about its sites.
        constants: cache index -> the layer's constants.
        observer: is told of the graph after every pass.

    Returns:
        A graph module without any marker.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(source.graph, copies)
    graph.output(output)
    for placeholder in graph.find_nodes(op="placeholder"):
        placeholder.args = ()  # all are given: those that follow have no defaults
    gm = fx.GraphModule(source, graph)
    step = _add_inputs(graph, layers)
    for layer in layers:
        _rewrite_layer(gm, layer, constants[layer.plan.index], copies, step)
    observer.graph("rewritten", gm)
    positions_from_slots(gm, step["slots"])
    observer.graph("positions from slots", gm)
    graph.eliminate_dead_code()
    for mask in graph.find_nodes(op="call_function", target=MASK):  # a module reads it itself
        mask.target = step_mask
    _drop_unused_inputs(graph)
    graph.lint()
    gm.recompile()
    observer.graph("dead code eliminated", gm)
    left = [n for n in graph.nodes if n.target in MARKERS]
    assert not left, f"markers left after the rewrite: {left}"
    _log.info("rewritten: %d layers, %d nodes before, %d after", len(layers),
              len(source.graph.nodes), len(graph.nodes))  # fmt: skip
    return gm


def _add_inputs(graph: fx.Graph, layers: Sequence[MatchedLayer]) -> dict[str, fx.Node]:
    names = list(STEP_INPUTS)
    for layer in layers:
        names += [f"pages_{layer.plan.index}", f"sinks_{layer.plan.index}"]
    last = list(graph.find_nodes(op="placeholder"))[-1]
    nodes = {}
    with graph.inserting_after(last):
        for name in reversed(names):
            nodes[name] = graph.placeholder(name)
    return nodes


def _rewrite_layer(
    gm: fx.GraphModule,
    layer: MatchedLayer,
    constants: LayerConstants,
    copies: Mapping[fx.Node, fx.Node],
    step: Mapping[str, fx.Node],
) -> None:
    graph, index = gm.graph, layer.plan.index
    append = copies[layer.append]
    key, value = append.args[:2]
    with graph.inserting_before(append):
        tables, geometry = _constant_nodes(gm, index, constants)
        stored = copies[layer.key_pre] if layer.plan.rope is not None else key
        pages, sinks = step[f"pages_{index}"], step[f"sinks_{index}"]
        new = graph.call_function(
            ops.append,
            (stored, value, step["slots"], step["table"], pages, sinks, tables, geometry,
             str(constants.layout)),
        )  # fmt: skip
    new.meta = {k: v for k, v in append.meta.items() if k != "val"} | {REPLACES: append.name}
    cache = (step["slots"], step["history"], step["table"], step["positions"], pages, sinks,
             tables, geometry)  # fmt: skip
    for old, plan in zip(layer.attends, layer.plan.attends, strict=True):
        logits = copies[layer.logits[old]] if old in layer.logits else None
        _replace_attend(graph, copies[old], (key, value, *cache), plan, step, constants, logits)


def _replace_attend(
    graph: fx.Graph,
    old: fx.Node,
    operands: tuple[Any, ...],
    plan: AttendPlan,
    step: Mapping[str, fx.Node],
    constants: LayerConstants,
    logits: fx.Node | None,
) -> None:
    query, sink_logits = old.args[0], old.args[4]
    slopes, selected = (*old.args[10:], None, None)[:2]
    with graph.inserting_before(old):
        slots = None
        if plan.selects:
            slots = graph.call_function(selected_slots, (selected, step["slot_columns"]))
        extra: list[Any] = [slopes, plan.chunk, slots, logits]
        while extra and not extra[-1]:
            extra.pop()
        new = graph.call_function(
            ops.attend,
            (query, *operands, sink_logits, plan.scale, plan.softcap, plan.window,
             step["exact_chunk"], str(constants.layout), *extra),
        )  # fmt: skip
        output = graph.call_function(operator.getitem, (new, 0))
    new.meta = {k: v for k, v in old.meta.items() if k != "val"} | {REPLACES: old.name}
    output.meta = dict(old.meta)
    old.replace_all_uses_with(output)
    graph.erase_node(old)


def _constant_nodes(
    gm: fx.GraphModule, index: int, constants: LayerConstants
) -> tuple[list[fx.Node], list[fx.Node]]:
    """get_attr nodes of the layer's tables and geometry."""
    tables, geometry = constants.arguments()
    names = (constants.table_names, _GEOMETRY)
    out: list[list[fx.Node]] = []
    for group, tensors in zip(names, (tables, geometry), strict=True):
        nodes = []
        for name, tensor in zip(group, tensors, strict=True):
            target = f"{CONSTANT_PREFIX}{index}_{name}"
            gm.register_buffer(target, tensor)
            nodes.append(gm.graph.get_attr(target))
        out.append(nodes)
    return out[0], out[1]


def _drop_unused_inputs(graph: fx.Graph) -> None:
    for node in list(graph.find_nodes(op="placeholder")):
        if not node.users:
            graph.erase_node(node)
