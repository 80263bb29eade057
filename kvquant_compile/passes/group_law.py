"""R(a) R(b) = R(a+b) in float64: what makes a matrix of cosines a rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvquant_compile.passes.rotation import Row

POINTS = tuple((a, b) for a in (1, 3, 17) for b in (2, 5, 100))


def matrix(rows: Sequence[Row], position: float) -> Tensor:
    """The float64 matrix [outputs, inputs] of the rows at one position."""
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for c, row in enumerate(rows):
        for i, wave in row.items():
            out[c, i] += wave.at(position)
    return out


def group_law_residual(rows: Sequence[Row], turning: Sequence[int], scale: float) -> float:
    """Largest violation of the group law, of R(0) = 1 and of orthogonality.

    Args:
        rows: the proved rows; output channels may be permuted against input channels.
        turning: output channels that turn; all others must pass through.
        scale: factor of the turning channels.

    With M(p) = S R(p) P, P a permutation and S the scale, R(p) = S^-1 M(p) M(0)^-1 S is the
    rotation in output channels.
    """
    size = torch.ones(len(rows), dtype=torch.float64)
    size[list(turning)] = scale
    start = matrix(rows, 0) / size[:, None]
    permutation = (start.abs().sum(0) - 1).abs().max() + (start @ start.T - torch.eye(
        len(rows), dtype=torch.float64)).abs().max()  # fmt: skip

    def turn(position: float) -> Tensor:
        return (matrix(rows, position) / size[:, None]) @ start.T

    worst = float(permutation)
    for a, b in POINTS:
        both = turn(a) @ turn(b)
        worst = max(worst, float((both - turn(a + b)).abs().max()))
        identity = torch.eye(len(rows), dtype=torch.float64)
        worst = max(worst, float((both @ both.T - identity).abs().max()))
    return worst
