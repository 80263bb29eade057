"""From a budget to an artifact: fit every width, find what each loses, allocate, mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.calibrate import (
    CalibrationOptions,
    choose_windows,
    made_by,
    observe_chosen,
)
from kvquant_compile.calib.observe import Observed
from kvquant_compile.capture.captured import Captured
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.mixed.knapsack import allocate
from kvquant_compile.mixed.measure import Losses, fisher_losses, measured_losses, no_gradients
from kvquant_compile.mixed.request import MixedBits
from kvquant_compile.mixed.widths import Fitted, Item, candidates, fit_widths
from kvquant_compile.observer import SILENT, Observer
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.progress import Progress
from kvquant_compile.recipes.choice import Choice

PROBE_WINDOWS, PROBE_TOKENS = 2, 512


def calibrate_mixed(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    choice: Choice,
    request: MixedBits,
    data: Any,
    tokenizer: Any,
    options: CalibrationOptions,
    bar: Progress,
    observer: Observer = SILENT,
) -> Artifact:
    """Formats and tables within a budget; arguments as of ``calibrate``.

    Raises:
        KVQuantError: the budget is too small, or the data is unusable.
    """
    candidates(layers, choice, request, captured.dtype.itemsize)  # refuse before work is done
    if request.method == "fisher" and not options.fit.sensitivity:
        raise no_gradients()
    windows, origin = choose_windows(captured, data, tokenizer, options, bar)
    observed, source = observe_chosen(captured, layers, windows, origin, options, bar)
    artifact = mix(captured, layers, choice, request, windows, observed, options, source, bar)
    observer.calibrated(layers, observed, artifact)
    return artifact


def mix(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    choice: Choice,
    request: MixedBits,
    windows: Sequence[Tensor],
    observed: Mapping[int, Observed],
    options: CalibrationOptions,
    source: Mapping[str, Any],
    bar: Progress,
) -> Artifact:
    """As :func:`calibrate_mixed`, from calibration tokens that are there.

    Args:
        windows: calibration windows int64 [1, S]; the first tokens of some are run again.
        observed: what was seen in them, keys as the layers store them.
        source: record of where they came from.
    """
    widths, budget = candidates(layers, choice, request, captured.dtype.itemsize)
    fitted = fit_widths(captured, layers, choice, widths, observed, options, bar)
    if request.method == "fisher":
        losses = fisher_losses(fitted.trips(), observed)
    else:
        losses = probe_losses(captured, fitted, windows, bar)
    picks = best_picks(fitted, losses, budget)
    mixed = _record(fitted, request, losses, picks)
    specs, tables = fitted.mixed_formats(picks), fitted.mixed_tables(picks)
    details = made_by(specs, tables, observed, options, source) | {"mixed": mixed}
    return Artifact.make(captured, layers, specs, tables, details)


def probe_losses(
    captured: Captured, fitted: Fitted, windows: Sequence[Tensor], bar: Progress
) -> Losses:
    """Losses of every item at every width, on a few calibration windows' first tokens."""
    trips = fitted.trips()
    steps = bar.each("measure sensitivity", list(trips), len(trips))
    return measured_losses(captured, fitted.layers, trips, probe_windows(windows), steps)


def probe_windows(windows: Sequence[Tensor]) -> list[Tensor]:
    """The first tokens of a few windows, spread over all: what sensitivity is measured on."""
    step = max(1, len(windows) // PROBE_WINDOWS)
    return [ids[:, :PROBE_TOKENS] for ids in windows[::step][:PROBE_WINDOWS]]


def best_picks(fitted: Fitted, losses: Losses, budget: int) -> dict[Item, int]:
    """The width of every item with the least sum of losses within ``budget`` bytes of a page."""
    items, widths = fitted.items, fitted.widths
    costs = [fitted.costs(item) for item in items]
    floor = fitted.page_bytes(dict.fromkeys(items, widths[0]))
    above = [[cost - row[0] for cost in row] for row in costs]
    options = allocate(above, [[losses[i][w] for w in widths] for i in items], budget - floor)
    assert options is not None, "the budget covers the least width"
    return {item: widths[option] for item, option in zip(items, options, strict=True)}


def _record(
    fitted: Fitted, request: MixedBits, losses: Losses, picks: Mapping[Item, int]
) -> dict[str, Any]:
    """JSON-able account of an allocation, for artifacts and reports."""
    return {
        "asked": request.asked,
        "method": request.method,
        "bytes_per_token": fitted.page_bytes(picks) / PAGE_TOKENS,
        "expected_kl": sum(losses[item][width] for item, width in picks.items()),
        "widths": {f"{index}.{part}": width for (index, part), width in picks.items()},
        "losses": {
            f"{index}.{part}": {str(width): loss for width, loss in by_width.items()}
            for (index, part), by_width in losses.items()
        },
    }
