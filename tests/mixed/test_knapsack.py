"""The allocation is the best one: compared with all of them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.mixed.knapsack import allocate


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    items, unit = draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 64]))
    costs, losses = [], []
    for _ in range(items):
        options = draw(st.integers(1, 4))
        costs.append([unit * draw(st.integers(0, 9)) + 7 for _ in range(options)])
        losses.append([draw(st.floats(0, 10)) for _ in range(options)])
    return costs, losses, draw(st.integers(0, 60 * unit))


def best(costs: list[list[int]], losses: list[list[float]], budget: int) -> float:
    every = itertools.product(*(range(len(row)) for row in costs))
    sums = [
        sum(row[i] for row, i in zip(losses, choice, strict=True))
        for choice in every
        if sum(row[i] for row, i in zip(costs, choice, strict=True)) <= budget
    ]
    return min(sums, default=math.inf)


@settings(max_examples=150, deadline=None)
@given(instances())
def test_no_choice_within_the_budget_loses_less(
    instance: tuple[list[list[int]], list[list[float]], int],
) -> None:
    costs, losses, budget = instance
    chosen = allocate(costs, losses, budget)
    if chosen is None:
        assert best(*instance) == math.inf
        return
    assert sum(row[i] for row, i in zip(costs, chosen, strict=True)) <= budget
    assert sum(row[i] for row, i in zip(losses, chosen, strict=True)) == pytest.approx(
        best(*instance)
    )


def test_a_budget_for_everything_takes_the_best_of_everything() -> None:
    assert allocate([[1, 2, 3]] * 40, [[3.0, 2.0, 1.0]] * 40, 10**9) == [2] * 40


def test_many_layers_are_solved() -> None:
    costs = [[w * 2048 + 300 for w in range(1, 6)] for _ in range(160)]
    losses = [[(1 + i % 7) * 4.0**-w for w in range(1, 6)] for i in range(160)]
    chosen = allocate(costs, losses, 160 * (3 * 2048 + 300))
    assert chosen is not None
    assert sum(chosen) == 160 * 2
    assert chosen[6] > chosen[0]
