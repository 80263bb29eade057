from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.slots import FLOAT16_MAX, inlier_range, largest, to_float16
from tests.codec.cases import generator, seeds


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 4), seed=seeds)
def test_narrowest_range_against_every_choice(count: int, seed: int) -> None:
    x = torch.randn(3, 7, generator=generator(seed))
    low, high = inlier_range(x, count)
    for row, got in zip(x, (high - low)[:, 0], strict=True):
        widths = [
            float(row[list(kept)].max() - row[list(kept)].min())
            for kept in combinations(range(7), 7 - count)
        ]
        assert abs(float(got) - min(widths)) < 1e-6


def test_float16_saturates_finite_values_only() -> None:
    x = torch.tensor([1e9, -1e9, torch.inf, -torch.inf, torch.nan, 1.5])
    got = to_float16(x)
    assert got[:4].tolist() == [FLOAT16_MAX, -FLOAT16_MAX, torch.inf, -torch.inf]
    assert bool(got[4].isnan())
    assert float(got[5]) == 1.5


@settings(max_examples=20, deadline=None)
@given(count=st.integers(0, 5), seed=seeds)
def test_largest_scores(count: int, seed: int) -> None:
    score = torch.rand(4, 9, generator=generator(seed))
    index = largest(score, count).long()
    assert index.shape == (4, count)
    torch.testing.assert_close(
        score.gather(1, index).sum(1), score.sort(1, descending=True).values[:, :count].sum(1)
    )


def test_nan_counts_as_largest() -> None:
    score = torch.tensor([[1.0, torch.nan, torch.inf, 3.0]])
    assert largest(score, 1).tolist() == [[1]]
    assert largest(score, 2).tolist() == [[1, 2]]


def test_index_type_follows_the_width() -> None:
    assert largest(torch.rand(1, 256), 1).dtype == torch.uint8
    assert largest(torch.rand(1, 257), 1).dtype == torch.int16
