"""Evaluating a model at several widths: calibrate once, build a program per width, score all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.calibrate import CalibrationOptions, fit_artifact, observe_windows
from kvquant_compile.calib.observe import Observed, behind_rope
from kvquant_compile.capture import Captured, capture
from kvquant_compile.config import FormatOptions
from kvquant_compile.evaluate.table import Row, baseline_codecs, evaluate_table
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


def build(prepared: Prepared, form: FormatOptions | Choice, options: CalibrationOptions) -> Program:
    """Fit tables for one format, or one recipe, and rewrite the graph with them."""
    if isinstance(form, Choice):
        options = form.calibration(options)
        specs = form.formats([layer.plan.index for layer in prepared.layers])
    else:
        specs = dict(form.specs([layer.plan.index for layer in prepared.layers]))
    layers = stored_layers(prepared.layers, specs)
    observed = {
        i: seen if (rope := layer.plan.kept) is None else behind_rope(seen, rope)
        for layer in layers
        if (seen := prepared.observed.get(i := layer.plan.index)) is not None
    }
    captured = prepared.captured
    artifact: Artifact = fit_artifact(captured, layers, specs, observed, options, prepared.source)
    specs, tables = artifact.for_model(captured, layers)
    return build_program(captured, layers, specs, tables)


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
