"""An optimised model's executable part: the rewritten graph and how to feed it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.leaves import STATES, new_states
from kvquant_compile.codec.formats import Format, Layout, Tables
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.observer import SILENT, Observer
from kvquant_compile.passes.device_past import COLUMNS
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.passes.rewrite import rewrite
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.identity import Identity
from kvquant_compile.runtime.slot_columns import slot_columns
from kvquant_compile.runtime.step import Step


@dataclass(frozen=True, eq=False)
class Program:
    """The rewritten graph with its layouts; runs one step at a time.

    Attributes:
        graph_module: see :mod:`kvquant_compile.passes.rewrite`.
        layouts: page layout by position in the cache; ``indices`` are the cache indices.
        indices: cache index of every layout.
        device, dtype: baked into the graph.
        model: whose weights the graph reads.
        tables: calibrated constants by cache index; None for lossless layers.
    """

    graph_module: fx.GraphModule
    layouts: tuple[Layout, ...]
    indices: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    tables: Mapping[int, Tables | None]

    def __repr__(self) -> str:
        kinds = "/".join(dict.fromkeys(layout.kind for layout in self.layouts))
        nodes = len(self.graph_module.graph.nodes)
        return f"Program({len(self.layouts)} layers {kinds}, {nodes} nodes, {self.device})"

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's placeholders, in order."""
        nodes = self.graph_module.graph.find_nodes(op="placeholder")
        return tuple(str(node.target) for node in nodes)

    def new_cache(self) -> QuantizedCache:
        """An empty cache."""
        most = self.graph_module.meta.get(COLUMNS)
        states = functools.partial(new_states, self.graph_module)
        return QuantizedCache(self.layouts, self.dtype, self.device, most, states, self.identity)

    def identity(self) -> Identity:
        """What caches of this program are bound to once they are saved."""
        return Identity.of(self.model, self.layouts, self.tables, self.dtype)

    def run(
        self,
        inputs: Mapping[str, Any],
        cache: QuantizedCache,
        positions: Tensor,
        attention_mask: Tensor | None,
        exact_chunk: bool,
    ) -> Tensor:
        """One step: append its tokens, attend, and commit the cache.

        Args:
            inputs: the captured graph's own inputs by placeholder name.
            cache: grown by the step's tokens; unchanged if the step fails.
            positions: int [B, S]; of no effect where the graph takes no positions: those that
                it knows are columns then, padding included.
            attention_mask: [B, cached + S] or None.
            exact_chunk: read the step's own tokens exactly (generation) instead of from the
                cache (honest evaluation).

        Returns:
            The graph's output.
        """
        batch, steps = positions.shape
        real = cache.admit(batch, steps, attention_mask)
        return self.proceed(inputs, cache, positions, real, exact_chunk)

    def proceed(
        self,
        inputs: Mapping[str, Any],
        cache: QuantizedCache,
        positions: Tensor,
        real: Tensor | None,
        exact_chunk: bool,
    ) -> Tensor:
        """:meth:`run` after the cache has admitted the step; ``real`` is what it answered."""
        if "past" in self.inputs and "position_ids" not in self.inputs:
            end = cache.columns + positions.shape[1]
            positions = torch.arange(cache.columns, end, device=self.device).expand_as(positions)
        step = cache.place(positions, real)
        # a recurrent state has gone on by then; pages have not changed below the old lengths
        guard = nullcontext() if cache.states is None else cache.undividable("a step")
        with guard:
            output = self.compute(inputs, cache, step, exact_chunk)
            cache.commit(step)
        return output

    def compute(
        self, inputs: Mapping[str, Any], cache: QuantizedCache, step: Step, exact_chunk: bool
    ) -> Tensor:
        """The graph's output for a step that is begun; arguments as of :meth:`run`."""
        values = {**inputs, **self._cache_inputs(cache, step), "exact_chunk": exact_chunk}
        if "attention_mask" in self.inputs and values["attention_mask"] is None:
            batch, steps = step.slots.shape
            size = batch, cache.columns + steps
            values["attention_mask"] = torch.ones(size, dtype=torch.int64, device=self.device)
        return cast("Tensor", self.graph_module(*(values[name] for name in self.inputs)))

    def _cache_inputs(self, cache: QuantizedCache, step: Step) -> dict[str, Any]:
        values: dict[str, Any] = {
            "slots": step.slots,
            "history": step.history,
            "table": cache.table,
            "positions": cache.positions,
            STATES: cache.states,
        }
        if "slot_columns" in self.inputs:
            values["slot_columns"] = slot_columns(cache, step)
        for index, layer in zip(self.indices, cache.pages, strict=True):
            values[f"pages_{index}"] = layer.slabs
            values[f"sinks_{index}"] = layer.sinks
        return values


def build_program(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    specs: Mapping[int, Format],
    tables: Mapping[int, Tables | None],
    observer: Observer = SILENT,
) -> Program:
    """Rewrite a captured model; formats and tables by cache index, None for lossless layers."""
    device, dtype = captured.device, captured.dtype
    constants = {
        index: lower_layer(layer.plan, specs[index], tables[index], dtype, device)
        for layer in layers
        for index in [layer.plan.index]
    }
    indices = tuple(layer.plan.index for layer in layers)
    return Program(
        rewrite(captured.graph_module, layers, constants, observer),
        tuple(constants[i].layout for i in indices),
        indices,
        device,
        dtype,
        captured.model,
        dict(tables),
    )
