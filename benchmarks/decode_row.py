"""One row of the decode table: its contenders side by side on the device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Size
from benchmarks.contenders import Contender, makers
from benchmarks.measure import Call, failure, graph_slice, wall_seconds
from benchmarks.rounds import Schedule, Slice, alternate, sustained

CHOOSING = Schedule(rounds=2, warm=1, slice_seconds=0.01, pause_seconds=0.0)
"""How the settings of a contender are compared before the fastest of them takes part."""


class NoSettingRuns(Exception):
    """Every setting of a contender failed; the message has the error of each."""


@dataclass(frozen=True)
class Entrant:
    """A contender of one row, ready to be measured.

    Attributes:
        contender: holds its inputs.
        setting: the fastest of its settings; empty where it has one only.
        run: replays it in that setting.
        failed: why other settings do not run.
    """

    contender: Contender
    setting: str
    run: Slice
    failed: tuple[str, ...] = ()


def enter(name: str, size: Size, device: torch.device) -> Entrant:
    """Set a contender up in its fastest setting.

    Raises:
        NoSettingRuns: it cannot be measured here; and whatever building its inputs raises.
    """
    contender = makers()[name](size, device)
    slices: dict[str, Slice] = {}
    errors: dict[str, str] = {}
    for setting, calls in contender.settings().items():
        try:
            slices[setting] = graph_slice(calls) if device.type == "cuda" else _wall_slice(calls)
        except Exception as error:
            errors[setting] = failure(error)
    if len(slices) > 1:
        times, late = alternate(slices, CHOOSING)
        errors |= late
        slices = {s: slices[s] for s in sorted(times, key=lambda s: min(times[s]))}
    if not slices:
        raise NoSettingRuns("; ".join(f"{s}: {e}" if s else e for s, e in errors.items()))
    setting, run = next(iter(slices.items()))
    return Entrant(contender, setting, run, tuple(f"{s}: {e}" for s, e in errors.items()))


def measure(
    names: Sequence[str], size: Size, device: torch.device, schedule: Schedule
) -> dict[str, dict[str, Any]]:
    """One row: all contenders in rounds, then each of them alone; or why one cannot run."""
    entrants: dict[str, Entrant] = {}
    errors: dict[str, str] = {}
    for name in names:
        try:
            entrants[name] = enter(name, size, device)
        except Exception as error:
            errors[name] = failure(error)
    times, late = alternate({name: e.run for name, e in entrants.items()}, schedule)
    errors |= late
    slowest = max(map(statistics.median, times.values()), default=0.0)
    alone = schedule.sustained_seconds > 0 and slowest >= schedule.sustained_from
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in errors:
            results[name] = {"error": errors[name]}
            continue
        results[name] = _result(entrants[name], times[name])
        if alone:
            results[name] |= _alone(entrants[name].run, schedule)
    return results


def _alone(run: Slice, schedule: Schedule) -> dict[str, Any]:
    try:
        return {"sustained_us": _microseconds(sustained(run, schedule))}
    except Exception as error:
        return {"sustained_error": failure(error)}


def _result(entrant: Entrant, seconds: Sequence[float]) -> dict[str, Any]:
    """What the rounds of one contender say."""
    median, nbytes = statistics.median(seconds), entrant.contender.cache_bytes
    result = {
        "us": _microseconds(median), "rounds_us": [_microseconds(s) for s in seconds],
        "cache_bytes": nbytes, "bytes_per_second": nbytes / median, "setting": entrant.setting,
    }  # fmt: skip
    return result | ({"failed_settings": entrant.failed} if entrant.failed else {})


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _wall_slice(calls: Sequence[Call]) -> Slice:
    """Of a device without graphs: one call, however long it takes."""
    calls[0]()
    return lambda _: wall_seconds(calls[0], 1, synchronise=False)[0]
