"""One-dimensional k-means by Lloyd steps on a fine histogram, from a quantile start."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 50
CELLS = 4096


def lloyd_levels(
    x: Tensor, weight: Tensor | None, count: int, ends: tuple[float, float] | None = None
) -> Tensor:
    """Levels that locally minimise the weighted squared error.

    Args:
        x: float32 [N], finite.
        weight: float32 [N], at least 0; None for equal weights.
        count: levels.
        ends: of the histogram; the samples' own if None.

    Returns:
        float32 [count], ascending.
    """
    low, high = (float(x.min()), float(x.max())) if ends is None else ends
    span = max(high - low, 1e-30)
    cell = ((x.double() - low) / span * (CELLS - 1)).round_().long()
    mass = torch.zeros(CELLS, device=x.device, dtype=torch.float64)
    mass.index_add_(0, cell, (torch.ones_like(x) if weight is None else weight).double())
    centre = low + span * torch.linspace(0, 1, CELLS, device=x.device, dtype=torch.float64)
    share = mass.cumsum(0) / mass.sum().clamp_min(1e-300)
    start = (torch.arange(count, device=x.device, dtype=torch.float64) + 0.5) / count
    levels = centre[torch.searchsorted(share, start).clamp(max=CELLS - 1)]
    for _ in range(STEPS):
        owner = torch.bucketize(centre, (levels[1:] + levels[:-1]) / 2)
        total = torch.zeros_like(levels).index_add_(0, owner, mass)
        moment = torch.zeros_like(levels).index_add_(0, owner, mass * centre)
        levels = torch.where(total > 0, moment / total.clamp_min(1e-300), levels)
    return levels.float()
