from __future__ import annotations

from itertools import combinations, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvquant_compile.calib.nuq import Histogram, histogram, lloyd, optimal_levels, weighted_kmeans

seeds = st.integers(0, 2**20)


def samples(seed: int, rows: int, count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, count, generator=g).clamp(-4, 4), torch.rand(rows, count, generator=g)


def objective(x: Tensor, weight: Tensor, levels: Tensor) -> Tensor:
    distance = (x[..., None].double() - levels[:, None]).square().amin(-1)
    return (distance * weight).sum(1)


def best_partition(x: Tensor, weight: Tensor, count: int) -> float:
    """Cost of the best split of sorted samples into ``count`` runs, by enumeration."""
    order = x.argsort()
    x, weight = x[order].double(), weight[order].double()
    costs = []
    for cut in combinations(range(1, len(x)), count - 1):
        edges = [0, *cut, len(x)]
        cost = 0.0
        for a, b in pairwise(edges):
            mean = (x[a:b] * weight[a:b]).sum() / weight[a:b].sum()
            cost += float((weight[a:b] * (x[a:b] - mean).square()).sum())
        costs.append(cost)
    return min(costs)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, count=st.integers(1, 4))
def test_dynamic_programme_is_optimal(seed: int, count: int) -> None:
    x, weight = samples(seed, 1, 9)
    order = x.argsort(1)
    x, weight = x.gather(1, order), weight.gather(1, order) + 0.01
    parts = (weight, weight * x, weight * x * x)
    hist = Histogram(*(p.double() for p in parts))
    levels = optimal_levels(hist, count)
    want = best_partition(x[0], weight[0], count)
    assert float(objective(x, weight, levels)[0]) <= want + 1e-6


@settings(max_examples=15, deadline=None)
@given(seed=seeds, bits=st.integers(1, 4))
def test_never_worse_than_even_levels(seed: int, bits: int) -> None:
    x, weight = samples(seed, 3, 500)
    levels = weighted_kmeans(x, weight, 2**bits, 4.0)
    assert levels.shape == (3, 2**bits)
    assert bool((levels.diff(dim=1) >= 0).all())
    even = torch.linspace(-3, 3, 2**bits, dtype=torch.float64).repeat(3, 1)
    fine = objective(x, weight, levels)
    assert bool((fine <= objective(x, weight, even) * 1.001).all())


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_lloyd_never_raises_the_cost(seed: int) -> None:
    x, weight = samples(seed, 2, 400)
    hist = histogram(x, weight, 4.0)
    levels = torch.linspace(-2, 1, 8, dtype=torch.float64).repeat(2, 1)
    before = objective(x, weight, levels)
    after = objective(x, weight, lloyd(hist, levels, 4.0, 5))
    assert bool((after <= before * 1.001).all())


def test_fewer_distinct_samples_than_levels() -> None:
    x = torch.tensor([[0.5, 0.5, -1.0]])
    levels = weighted_kmeans(x, torch.ones_like(x), 8, 4.0)
    assert float(objective(x, torch.ones_like(x), levels)[0]) < 1e-9
    assert bool(levels.isfinite().all())


def test_weights_decide_where_levels_go() -> None:
    x = torch.linspace(-2, 2, 400)[None]
    right = weighted_kmeans(x, (x > 1).float() + 1e-4, 4, 4.0)
    assert int((right > 0.9).sum()) >= 3


def test_histogram_keeps_mass_and_moments() -> None:
    x, weight = samples(0, 2, 300)
    hist = histogram(x, weight, 2.0)
    assert hist.merged(256).weight.shape == (2, 256)
    for part, power in ((hist.weight, 0), (hist.moment, 1), (hist.energy, 2)):
        want = (weight.double() * x.double() ** power).sum(1)
        torch.testing.assert_close(part.sum(1), want)
