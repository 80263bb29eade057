"""The rotation of a stored key by its token's offset in a page, as terms of a series.

With i in half pages from the page's middle, -1..1, and x a pair's angle over half a page, Jacobi
and Anger's ``cos(i x) = J0(x) - 2 J2(x) T2(i) + ..``, ``sin(i x) = 2 J1(x) T1(i) - 2 J3(x) T3(i) +
..`` (T Chebyshev's polynomials, J Bessel's functions) separates tokens from pairs: every term is a
column of a matrix product with keys as they are stored, and polynomials multiply sums. Pairs that
turn too far for it are *explicit*: their keys are turned (:mod:`.turns`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvquant_compile.lowering.turns import SMALL

MOST_TERMS = 8

SERIES_LIMITS = {2: 0.05, 4: 0.7, MOST_TERMS: 3.21}
"""Number of terms -> the largest angle, in radians over half a page, that so many terms of a
rotation's series reach: to 6e-4, 1.3e-3 and 1.6e-3 at the far ends of a page."""


def explicit_groups(frequencies: Tensor, terms: int) -> int:
    """Leading groups of sixteen pairs with one that turns too far for so many terms."""
    far = (frequencies.double().abs() * 32 > SERIES_LIMITS[terms]).nonzero().flatten()
    return 0 if far.numel() == 0 else int(far.max()) // 16 + 1


def series_coefficients(frequencies: Tensor) -> Tensor:
    """Of Chebyshev polynomials of a token's offset in half pages: float64 [P, 8].

    The even ones make the cosine, the odd ones the sine (Jacobi and Anger); zero for pairs that
    turn too far.
    """
    angle = frequencies.double() * 32
    degrees, turn = torch.arange(MOST_TERMS), torch.arange(64) * (math.tau / 64)
    sign = torch.where(degrees % 4 < 2, 1.0, -1.0) * torch.where(degrees == 0, 1.0, 2.0)
    # Bessel's integral of the first kind; of so smooth a period, its mean is exact
    phase = degrees[:, None] * turn - angle[:, None, None] * turn.sin()
    bessel = phase.cos().mean(-1)
    return torch.where(angle.abs()[:, None] > SERIES_LIMITS[MOST_TERMS], 0.0, sign * bessel)


def column_coefficients(frequencies: Tensor, held: Tensor, explicit: int) -> Tensor:
    """By column, the factors of a query's member and of the pair's other one.

    Of a series its terms. Of the first groups, which turn explicitly, the query, and the query
    turned back by a token, over what turned keys are smaller by.

    Args:
        frequencies: [P].
        held: float64 [H, P], what turned keys are over besides.
        explicit: groups of pairs.

    Returns:
        float64 [H, P, 8, 2].
    """
    terms, even = series_coefficients(frequencies), torch.arange(MOST_TERMS) % 2 == 0
    out = torch.stack([terms * even, terms * ~even], -1).repeat(held.shape[0], 1, 1, 1)
    first = slice(16 * explicit)
    size, step = held[:, first] / SMALL, frequencies.double()[first]
    out[:, first] = 0
    out[:, first, 0, 0] = size
    out[:, first, 1] = torch.stack([size * step.cos(), size * step.sin()], -1)
    return out
