"""Contenders measured in turn, so that all of them see the same clocks and the same heat.

A device at its power limit lowers its clock within milliseconds, by as much as what runs on it
asks for. Times that were taken one contender after another therefore depend on who ran before.
Here every contender runs for a short slice in each round, in another order each time, and the
device rests before every slice, so that all of them find it at its full clock; a result is the
median over rounds. What a contender does under steady load, with the device to itself, is measured
afterwards.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import failure

Slice = Callable[[float], float]
"""Runs for about so many seconds, and returns the mean seconds of one call."""

LAST = 4
"""Slices at the end of a sustained run whose median counts."""


@dataclass(frozen=True)
class Schedule:
    """How long everything runs.

    Attributes:
        rounds: that count.
        warm: rounds before them, which bring the device to its clock.
        slice_seconds: of one contender in one round.
        pause_seconds: without work before every slice.
        sustained_seconds: of one contender alone, after the rounds; 0 for none.
        sustained_from: seconds of the slowest call from which contenders also run alone: below,
            the device is not at its power limit.
    """

    rounds: int = 5
    warm: int = 1
    slice_seconds: float = 0.02
    pause_seconds: float = 0.05
    sustained_seconds: float = 0.3
    sustained_from: float = 100e-6


def order(names: Sequence[str], number: int) -> list[str]:
    """Contenders in the order of a round: turned by one from round to round, and every other round
    backwards, so that nobody always runs first or after the same one."""
    start = number % len(names) if names else 0
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if number % 2 else turned


def alternate(
    slices: Mapping[str, Slice], schedule: Schedule
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Measure in rounds.

    Returns:
        Contender -> seconds of one call in every round, and contender -> error. One that fails
        is in the latter alone, and the others go on.
    """
    times: dict[str, list[float]] = {name: [] for name in slices}
    errors: dict[str, str] = {}
    for number in range(schedule.warm + schedule.rounds):
        for name in order(list(times), number):
            time.sleep(schedule.pause_seconds)
            try:
                times[name].append(slices[name](schedule.slice_seconds))
            except Exception as error:
                errors[name] = failure(error)
                del times[name]
    return {name: found[schedule.warm :] for name, found in times.items()}, errors


def sustained(run: Slice, schedule: Schedule) -> float:
    """Seconds of one call at the end of slices without a pause between them."""
    count = math.ceil(schedule.sustained_seconds / schedule.slice_seconds)
    return statistics.median([run(schedule.slice_seconds) for _ in range(count)][-LAST:])
