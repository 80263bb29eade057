"""Capture: a decoder becomes one flat FX graph with marked append, mask and attention sites."""

from __future__ import annotations

import time
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvquant_compile.capture.captured import CacheLayout, Captured
from kvquant_compile.capture.functional_model import capture_functional
from kvquant_compile.capture.markers import APPEND, ATTEND, MASK
from kvquant_compile.capture.run import run_marked
from kvquant_compile.capture.transformers_model import capture_transformers
from kvquant_compile.logs import logger
from kvquant_compile.observer import SILENT, Observer

__all__ = ["APPEND", "ATTEND", "MASK", "CacheLayout", "Captured", "capture", "run_marked"]

_log = logger("capture")


def capture(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    observer: Observer = SILENT,
) -> Captured:
    """Capture a decoder; the model is not changed.

    Args:
        model: a transformers ``PreTrainedModel``, or any module of a convention of
            :mod:`.decoder`.
        example_inputs: ``(ids, past)`` for the latter; ids int64 [B, S], past an empty cache or a
            start position. Not used for transformers.
        observer: is told of the graph at every stage.

    Raises:
        UnsupportedModelError: what the model is, or does, rules a sound capture out.
        UnsupportedLayerError: one attention, mask or cache layer does.
    """
    start = time.perf_counter()
    if isinstance(model, PreTrainedModel):
        captured = capture_transformers(model, observer)
    else:
        captured = capture_functional(model, example_inputs, observer)
    _log.info(
        "%s: %d nodes, %s, in %.1f s", type(model).__name__, len(captured.graph_module.graph.nodes),
        captured.convention, time.perf_counter() - start,
    )  # fmt: skip
    _log.debug("self-check: %s", captured.evidence)
    return captured
