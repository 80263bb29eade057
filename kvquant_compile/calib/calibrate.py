"""Calibration from end to end: windows, observation, fit, artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.data import (
    WindowSettings,
    calibration_windows,
    sample_windows,
    vocabulary,
)
from kvquant_compile.calib.fit import fit_layer, fit_recipe
from kvquant_compile.calib.observe import Observed, observe
from kvquant_compile.calib.outliers import outlying_values
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.capture.captured import Captured
from kvquant_compile.codec.algebra.recipe import Recipe
from kvquant_compile.codec.formats import Format, Tables
from kvquant_compile.errors import OptionError
from kvquant_compile.logs import logger
from kvquant_compile.observer import SILENT, Observer
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.progress import Progress

_log = logger("calib")
OWN_TOKENS, OWN_BATCH = 256, 96
"""Own text beside given text: many short sequences, since it is there for being varied."""
SENSITIVITIES = ("fisher", "none")


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        windows: number, size and choice of windows.
        fit: ingredients of the fit.
        sampled: windows when the model has to sample them itself (sampling costs a decode step
            per token, so they are shorter).
        own_text: part of the tokens that the model samples itself where text is given. Tables from
            a narrow text alone serve others badly: channels' means move by a third of a deviation.
    """

    windows: WindowSettings = field(default_factory=WindowSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    sampled: WindowSettings = field(default_factory=lambda: WindowSettings(32, 512))
    own_text: float = 0.75

    @property
    def given(self) -> WindowSettings:
        """What is taken of a given text."""
        count = max(1, round(self.windows.windows * (1 - self.own_text)))
        return replace(self.windows, windows=count)

    def own(self, given: Sequence[Tensor]) -> WindowSettings:
        """What the model samples beside some windows of a text, in proportion to their tokens."""
        longest = max(ids.shape[1] for ids in given)
        tokens = sum(ids.shape[1] for ids in given) * self.own_text / (1 - self.own_text)
        length = min(OWN_TOKENS, longest)
        return WindowSettings(max(1, round(tokens / length)), length, self.windows.seed)

    @staticmethod
    def make(
        seed: int = 0,
        windows: int | None = None,
        sensitivity: str = "fisher",
        own_text: float | None = None,
    ) -> CalibrationOptions:
        """Options from what ``optimize`` was given.

        Raises:
            OptionError: a value cannot be honoured.
        """
        if sensitivity not in SENSITIVITIES:
            raise OptionError(
                f"sensitivity={sensitivity!r}",
                why=f"it is one of {', '.join(SENSITIVITIES)}",
                do='Pass "fisher" or "none".',
            )
        if not _is_whole(seed):
            raise OptionError(
                f"seed={seed!r}", why="it is a whole number", do="Leave it out for the default."
            )
        if windows is not None and (not _is_whole(windows) or windows < 1):
            raise OptionError(
                f"windows={windows!r}",
                why="it is a whole number of calibration windows, at least 1",
                do="Leave it out for the default.",
            )
        base = CalibrationOptions()
        own = base.own_text if own_text is None else _own_part(own_text)
        given = WindowSettings(windows or base.windows.windows, base.windows.tokens, seed)
        sampled = WindowSettings(windows or base.sampled.windows, base.sampled.tokens, seed)
        fit = FitSettings(sensitivity=sensitivity == "fisher")
        return CalibrationOptions(given, fit, sampled, own)


def _own_part(part: Any) -> float:
    number = isinstance(part, int | float) and not isinstance(part, bool)
    if not number or not 0 <= part < 1:
        raise OptionError(
            f"own_text={part!r}",
            why="it is the part of the calibration tokens that the model samples itself beside a "
            "given text, at least 0 and below 1",
            do="Leave it out for three quarters, pass 0 for text alone, or give no text at all.",
        )
    return float(part)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def observe_windows(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    data: Any,
    tokenizer: Any,
    options: CalibrationOptions,
    bar: Progress,
) -> tuple[dict[int, Observed], dict[str, Any]]:
    """Keys, values and gradients over the user's windows, or over sampled ones if there are none,
    and a record of what was used.

    Raises:
        CalibrationError: the data is unusable.
    """
    windows, source = choose_windows(captured, data, tokenizer, options, bar)
    return observe_chosen(captured, layers, windows, source, options, bar)


def choose_windows(
    captured: Captured, data: Any, tokenizer: Any, options: CalibrationOptions, bar: Progress
) -> tuple[list[Tensor], str]:
    """Windows int64 [1, S] of the user's data and of the model's own text, and a word for where
    they come from.

    Raises:
        CalibrationError: the data is unusable.
    """
    if data is None:
        bar.stage("sample calibration text")
        return sample_windows(captured, options.sampled), "sampled by the model"
    given = calibration_windows(data, tokenizer, captured, options.given)
    if not options.own_text:
        return given, "given"
    if not vocabulary(captured.model):
        _log.warning("calibrated on the given text alone: the model's vocabulary is not known")
        return given, "given"
    bar.stage("sample calibration text")
    own = sample_windows(captured, options.own(given), OWN_BATCH)
    return [*given, *own], "given and sampled by the model"


def observe_chosen(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    windows: Sequence[Tensor],
    origin: str,
    options: CalibrationOptions,
    bar: Progress,
) -> tuple[dict[int, Observed], dict[str, Any]]:
    """As :func:`observe_windows`, of windows int64 [1, S] that are chosen already, and a word for
    where they come from."""
    batches = batched(windows, options.windows.tokens)
    steps = bar.each("observe keys and values", batches, len(batches))
    observed = observe(captured, layers, steps, options.fit.sensitivity)
    source = {
        "source": origin,
        "windows": len(windows),
        "tokens": sum(w.shape[1] for w in windows),
        "seed": options.windows.seed,
    }
    _log.info("observed %(tokens)d tokens in %(windows)d windows, %(source)s", source)
    return observed, source


def batched(windows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Neighbours of one length [1, S] as batches [B, S] of at most so many tokens."""
    groups: list[list[Tensor]] = []
    for ids in windows:
        last = groups[-1] if groups else []
        fits = (len(last) + 1) * ids.shape[1] <= tokens
        if last and fits and last[0].shape == ids.shape:
            last.append(ids)
        else:
            groups.append([ids])
    return [torch.cat(group) for group in groups]


def fit_artifact(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    specs: Mapping[int, Format],
    observed: Mapping[int, Observed],
    options: CalibrationOptions,
    source: Mapping[str, Any],
    bar: Progress | None = None,
) -> Artifact:
    """Fit every layer's tables and bind them to the model; ``source`` says where from."""
    tables = fit_tables(captured, layers, specs, observed, options, bar)
    details = made_by(specs, tables, observed, options, source)
    return Artifact.make(captured, layers, specs, tables, details)


def made_by(
    specs: Mapping[int, Format],
    tables: Mapping[int, Tables],
    observed: Mapping[int, Observed],
    options: CalibrationOptions,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """JSON-able account of how tables were made, for artifacts and reports."""
    details = {**source, "fit": asdict(options.fit)}
    outlying = outlying_values(specs, tables, observed)
    return details | ({"outlying_values": outlying} if outlying else {})


def fit_tables(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    specs: Mapping[int, Format],
    observed: Mapping[int, Observed],
    options: CalibrationOptions,
    bar: Progress | None = None,
) -> dict[int, Tables]:
    """Every layer's tables by cache index; lossless layers have none."""
    tables: dict[int, Tables] = {}
    order = [layer.plan for layer in layers]
    for plan in order if bar is None else bar.each("fit tables", order, len(order)):
        index = plan.index
        spec, seen = specs[index], observed.get(index)
        if isinstance(spec, Recipe):
            seed = options.windows.seed
            tables[index] = fit_recipe(spec, plan, seen, seed, captured.device)
        elif not spec.lossless:
            assert seen is not None
            tables[index] = fit_layer(
                seen.keys,
                seen.values,
                seen.key_gradients,
                seen.value_gradients,
                spec,
                options.fit,
                ignore=seen.places < spec.sink_tokens,
                rope=plan.rope,
            )
        _log.debug("layer %d: %r", index, tables.get(index, "no tables"))
    return tables


def needs_calibration(spec: Format) -> bool:
    """Whether a format's constants depend on data."""
    return spec.calibrated if isinstance(spec, Recipe) else not spec.lossless


def calibrate(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    specs: Mapping[int, Format],
    data: Any,
    tokenizer: Any,
    options: CalibrationOptions,
    bar: Progress,
    observer: Observer = SILENT,
) -> Artifact:
    """Tables for a model; nothing of it is run when no layer's format needs calibration."""
    observed: dict[int, Observed] = {}
    source: dict[str, Any] = {"source": "none needed"}
    if any(needs_calibration(spec) for spec in specs.values()):
        observed, source = observe_windows(captured, layers, data, tokenizer, options, bar)
    artifact = fit_artifact(captured, layers, specs, observed, options, source, bar)
    observer.calibrated(layers, observed, artifact)
    return artifact
