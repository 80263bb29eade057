"""Rotations as series: which pairs, and how closely."""

from __future__ import annotations

import math

import pytest
import torch

from kvquant_compile.lowering.series import (
    SERIES_LIMITS,
    column_coefficients,
    explicit_groups,
    series_coefficients,
)
from kvquant_compile.lowering.turns import SMALL
from tests.lowering.reference import half_rope


def test_which_groups_turn_explicitly() -> None:
    slow, fast = 0.049 / 32, 0.051 / 32
    f = torch.full((48,), slow)
    assert explicit_groups(f, 2) == 0
    for pair, groups in ((0, 1), (15, 1), (16, 2), (47, 3)):
        g = f.clone()
        g[pair] = -fast
        assert explicit_groups(g, 2) == groups
        assert explicit_groups(g, 4) == 0
    llama = half_rope(128, 128, 1e4).frequencies
    assert [explicit_groups(torch.tensor(llama), terms) for terms in (2, 4, 8)] == [3, 2, 1]


@pytest.mark.parametrize("terms", SERIES_LIMITS)
def test_a_series_turns_by_every_offset(terms: int) -> None:
    """At any offset in a page, to the tolerance that the limits state."""
    frequencies = torch.linspace(0, 1, 50, dtype=torch.float64) * SERIES_LIMITS[terms] / 32
    coefficients = series_coefficients(frequencies)[:, :terms]
    offset = torch.arange(-32, 32).double()
    polynomials = torch.cos(torch.arange(terms)[:, None] * torch.arccos(offset / 32))
    angle = frequencies[:, None] * offset
    for parity, exact in enumerate((angle.cos(), angle.sin())):
        found = coefficients[:, parity::2] @ polynomials[parity::2]
        assert (found - exact).abs().max() < {2: 6.5e-4, 4: 1.3e-3, 8: 1.7e-3}[terms]


def test_pairs_that_turn_too_far_have_no_series() -> None:
    assert (series_coefficients(torch.tensor([0.11, -0.2])) == 0).all()


def test_columns_are_terms_or_neighbours() -> None:
    """A group that turns fast has the query and the query a token back, over what its keys are
    smaller by; a slow one the series' terms, even ones of a query's own member."""
    frequencies = torch.cat([torch.full((16,), 0.3), torch.full((16,), 1e-3)]).double()
    held = torch.tensor([[0.5], [0.25]], dtype=torch.float64).expand(2, 32)
    found = column_coefficients(frequencies, held, 1)
    size = held[:, :16] / SMALL
    back = torch.stack([size * math.cos(0.3), size * math.sin(0.3)], -1)
    torch.testing.assert_close(found[:, :16, 0], torch.stack([size, 0 * size], -1))
    torch.testing.assert_close(found[:, :16, 1], back)
    assert (found[:, :16, 2:] == 0).all()
    terms = series_coefficients(frequencies[16:])
    for term in range(8):
        other = term % 2
        assert (found[:, 16:, term, other] == terms[:, term]).all()
        assert (found[:, 16:, term, 1 - other] == 0).all()
