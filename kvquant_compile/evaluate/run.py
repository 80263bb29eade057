"""A model made ready for evaluation: calibrated once, then a program for every format."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.calibrate import (
    CalibrationOptions,
    choose_windows,
    fit_artifact,
    observe_chosen,
)
from kvquant_compile.calib.observe import Observed, behind_rope
from kvquant_compile.capture import Captured, capture
from kvquant_compile.config import FormatOptions
from kvquant_compile.passes.recognise import MatchedLayer, recognise
from kvquant_compile.progress import Progress
from kvquant_compile.recipes.choice import Choice, stored_layers
from kvquant_compile.runtime.program import Program, build_program


@dataclass(frozen=True, eq=False)
class Prepared:
    """A captured model with its calibration tokens.

    Attributes:
        captured, layers: what the passes found.
        observed: cache index -> calibration tokens.
        source: where they came from.
        seconds: stage -> wall time.
        windows: the calibration windows, int64 [1, S] each.
    """

    captured: Captured
    layers: tuple[MatchedLayer, ...]
    observed: Mapping[int, Observed]
    source: Mapping[str, Any]
    seconds: dict[str, float]
    windows: Sequence[Tensor] = ()

    def stored(self, layers: Sequence[MatchedLayer]) -> dict[int, Observed]:
        """The tokens as ``layers`` store them: keys rotated where they are kept so."""
        return {
            i: seen if (rope := layer.plan.kept) is None else behind_rope(seen, rope)
            for layer in layers
            if (seen := self.observed.get(i := layer.plan.index)) is not None
        }


def prepare(
    model: nn.Module, calibration: Any, tokenizer: Any, options: CalibrationOptions, bar: Progress
) -> Prepared:
    """Capture, recognise and observe; the model itself stays as it is."""
    start = time.perf_counter()
    captured = capture(model)
    layers = recognise(captured)
    captured_at = time.perf_counter()
    windows, origin = choose_windows(captured, calibration, tokenizer, options, bar)
    observed, source = observe_chosen(captured, layers, windows, origin, options, bar)
    seconds = {
        "capture": captured_at - start,
        "observe": time.perf_counter() - captured_at,
    }
    return Prepared(captured, layers, observed, source, seconds, windows)


def build(prepared: Prepared, form: FormatOptions | Choice, options: CalibrationOptions) -> Program:
    """Fit tables for one format, or one recipe, and rewrite the graph with them."""
    if isinstance(form, Choice):
        options = form.calibration(options)
        specs = form.formats([layer.plan.index for layer in prepared.layers])
    else:
        specs = dict(form.specs([layer.plan.index for layer in prepared.layers]))
    layers = stored_layers(prepared.layers, specs)
    captured = prepared.captured
    observed = prepared.stored(layers)
    artifact: Artifact = fit_artifact(captured, layers, specs, observed, options, prepared.source)
    specs, tables = artifact.for_model(captured, layers)
    return build_program(captured, layers, specs, tables)
