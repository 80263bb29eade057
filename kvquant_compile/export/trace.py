"""Tracing a step with free batch, sequence and capacity, and the names of what goes in and out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvquant_compile.export.cache_steps import LayerStore
from kvquant_compile.export.step import StepModule

# Hints for free sizes; 0 and 1 would be taken for constants, and equal ones for the same.
BATCH, SEQUENCE, CAPACITY = 2, 6, 3

Inputs = tuple[Tensor, Tensor | None, Tensor, list[Tensor], list[Tensor]]


def example_inputs(
    stores: Mapping[int, LayerStore], masked: bool, batch: int, sequence: int, capacity: int
) -> Inputs:
    """Inputs of :class:`StepModule` for an empty cache, all tokens real."""
    sizes = {"batch": batch, "capacity": capacity}
    pages, sinks = (
        [torch.zeros_like(store.cache[i].example(sizes)) for store in stores.values()]
        for i in (0, 1)
    )
    ids = torch.ones(batch, sequence, dtype=torch.int64)
    lengths = torch.zeros(batch, dtype=torch.int64)
    return ids, torch.ones_like(ids) if masked else None, lengths, pages, sinks


def trace_step(step: StepModule) -> torch.export.ExportedProgram:
    """A step as an exported program with free sizes."""
    masked, free = not step.functional, torch.export.Dim.DYNAMIC
    inputs = example_inputs(step.stores, masked, BATCH, SEQUENCE, CAPACITY)
    rows = {0: free, 1: free}
    count = len(step.stores)
    shapes = (rows, rows if masked else None, {0: free}, [rows] * count, [{0: free}] * count)
    with torch.no_grad():
        return torch.export.export(step, inputs, dynamic_shapes=shapes, strict=False)


def input_names(stores: Mapping[int, LayerStore], masked: bool) -> list[str]:
    """Names of the tensors of :func:`example_inputs`, in order."""
    mask = ["token_mask"] if masked else []
    pages, sinks = ([f"past.{i}.{part}" for i in stores] for part in ("pages", "sinks"))
    return ["input_ids", *mask, "past_lengths", *pages, *sinks]


def output_names(stores: Mapping[int, LayerStore]) -> list[str]:
    """Names of what a step returns, in order."""
    pages, sinks = ([f"present.{i}.{part}" for i in stores] for part in ("pages", "sinks"))
    return ["logits", "present_lengths", *pages, *sinks]
