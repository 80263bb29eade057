"""The exact allocation: one option of every item, least total loss within a budget.

A multiple-choice knapsack by dynamic programming. Costs are whole bytes whose differences share a
large divisor (pages hold whole words of codes), so that the table has few columns: 64 items with
five widths each are solved in milliseconds, without a solver to depend on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def allocate(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int] | None:
    """Which option every item takes.

    Args:
        costs: bytes of every option of every item, not negative.
        losses: what every option loses, same shape.
        budget: bytes that all items may take together.

    Returns:
        Index of the chosen option, by item; None where even the cheapest ones cost more.
    """
    least = [min(row) for row in costs]
    spare = budget - sum(least)
    if spare < 0:
        return None
    extra = [[c - low for c in row] for row, low in zip(costs, least, strict=True)]
    unit = math.gcd(*(c for row in extra for c in row)) or 1
    most = sum(max(row) for row in extra)  # more than this nothing can take
    columns = min(spare, most) // unit + 1
    best, taken = np.zeros(columns), []
    for row, loss in zip(extra, losses, strict=True):
        options = np.full((len(row), columns), np.inf)
        for i, (cost, value) in enumerate(zip(row, loss, strict=True)):
            step = cost // unit
            if step < columns:
                options[i, step:] = best[: columns - step] + value
        taken.append(options.argmin(0))
        best = options.min(0)
    return _trace(extra, taken, unit, columns - 1)


def _trace(
    extra: Sequence[Sequence[int]], taken: Sequence[np.ndarray], unit: int, column: int
) -> list[int]:
    """Follow the table back from its last column."""
    chosen = []
    for row, options in zip(reversed(extra), reversed(taken), strict=True):
        option = int(options[column])
        chosen.append(option)
        column -= row[option] // unit
    return chosen[::-1]
