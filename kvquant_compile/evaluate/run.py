"""Evaluating a model at several widths: calibrate once, build a program per width, score all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.calibrate import CalibrationOptions, fit_artifact, observe_windows
from kvquant_compile.calib.observe import Observed
from kvquant_compile.capture import Captured, capture
from kvquant_compile.codec.formats import Format
from kvquant_compile.config import FormatOptions
from kvquant_compile.evaluate.table import Row, baseline_codecs, evaluate_table
from kvquant_compile.passes.recognise import MatchedLayer, recognise
from kvquant_compile.progress import Progress
from kvquant_compile.runtime.program import Program, build_program


@dataclass(frozen=True, eq=False)
class Prepared:
    """A captured model with its calibration tokens.

    Attributes:
        captured, layers: what the passes found.
        observed: cache index -> calibration tokens.
        source: where they came from.
        seconds: stage -> wall time.
    """

    captured: Captured
    layers: tuple[MatchedLayer, ...]
    observed: Mapping[int, Observed]
    source: Mapping[str, Any]
    seconds: dict[str, float]


def prepare(
    model: nn.Module, calibration: Any, tokenizer: Any, options: CalibrationOptions, bar: Progress
) -> Prepared:
    """Capture, recognise and observe; the model itself stays as it is."""
    start = time.perf_counter()
    captured = capture(model)
    layers = recognise(captured)
    captured_at = time.perf_counter()
    observed, source = observe_windows(captured, layers, calibration, tokenizer, options, bar)
    seconds = {
        "capture": captured_at - start,
        "observe": time.perf_counter() - captured_at,
    }
    return Prepared(captured, layers, observed, source, seconds)


def build(prepared: Prepared, form: FormatOptions, options: CalibrationOptions) -> Program:
    """Fit tables for one format and rewrite the graph with them."""
    specs: dict[int, Format] = dict(form.specs([layer.plan.index for layer in prepared.layers]))
    artifact: Artifact = fit_artifact(
        prepared.captured, prepared.layers, specs, prepared.observed, options, prepared.source
    )
    specs, tables = artifact.for_model(prepared.captured, prepared.layers)
    return build_program(prepared.captured, prepared.layers, specs, tables)


def evaluate_widths(
    prepared: Prepared,
    bits: Sequence[int],
    windows: Sequence[Tensor],
    options: CalibrationOptions,
    bar: Progress,
    baselines: bool = True,
) -> list[Row]:
    """The table of :mod:`.table` for ours at every width, with the baselines."""
    programs: dict[str, tuple[int, Program]] = {}
    for b in bar.each("fit tables", list(bits), len(bits)):
        start = time.perf_counter()
        form = FormatOptions(b)
        programs[f"ours, {b} bits"] = (b, build(prepared, form, options))
        prepared.seconds[f"fit {b} bits"] = time.perf_counter() - start
    codecs = baseline_codecs(bits, prepared.observed) if baselines else {}
    return evaluate_table(
        prepared.captured,
        prepared.layers,
        programs,
        codecs,
        windows,
        lambda items: bar.each("score windows", items, len(items)),
    )
