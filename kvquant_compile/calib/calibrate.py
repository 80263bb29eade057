"""Calibration from end to end: windows, observation, fit, artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.data import WindowSettings, calibration_windows, sample_windows
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
SENSITIVITIES = ("fisher", "none")


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        windows: number, size and choice of windows.
        fit: ingredients of the fit.
        sampled: windows when the model has to sample them itself (sampling costs a decode step
            per token, so they are shorter).
    """

    windows: WindowSettings = field(default_factory=WindowSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    sampled: WindowSettings = field(default_factory=lambda: WindowSettings(32, 512))

    @staticmethod
    def make(
        seed: int = 0, windows: int | None = None, sensitivity: str = "fisher"
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
        given = WindowSettings(windows or base.windows.windows, base.windows.tokens, seed)
        sampled = WindowSettings(windows or base.sampled.windows, base.sampled.tokens, seed)
        fit = FitSettings(sensitivity=sensitivity == "fisher")
        return CalibrationOptions(given, fit, sampled)


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
    windows = choose_windows(captured, data, tokenizer, options, bar)
    return observe_chosen(captured, layers, windows, data is None, options, bar)


def choose_windows(
    captured: Captured, data: Any, tokenizer: Any, options: CalibrationOptions, bar: Progress
) -> list[Tensor]:
    """The user's windows int64 [1, S], or sampled ones if there is no data.

    Raises:
        CalibrationError: the data is unusable.
    """
    if data is None:
        bar.stage("sample calibration text")
        return sample_windows(captured, options.sampled)
    return calibration_windows(data, tokenizer, captured, options.windows)


def observe_chosen(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    windows: Sequence[Tensor],
    sampled: bool,
    options: CalibrationOptions,
    bar: Progress,
) -> tuple[dict[int, Observed], dict[str, Any]]:
    """As :func:`observe_windows`, of windows int64 [1, S] that are chosen already."""
    steps = bar.each("observe keys and values", windows, len(windows))
    observed = observe(captured, layers, steps, options.fit.sensitivity)
    source = {
        "source": "sampled by the model" if sampled else "given",
        "windows": len(windows),
        "tokens": sum(w.shape[1] for w in windows),
        "seed": options.windows.seed,
    }
    _log.info("observed %(tokens)d tokens in %(windows)d windows, %(source)s", source)
    return observed, source


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
