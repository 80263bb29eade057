"""Tables to start from."""

from __future__ import annotations

import torch
from torch import Tensor


def even_levels(count: int, limit: float) -> Tensor:
    """Evenly spaced float32 levels [count] with the ends at plus and minus ``limit``."""
    return torch.linspace(-limit, limit, count)


def normal_levels(count: int) -> Tensor:
    """Midpoint quantiles of the standard normal distribution, float32 [count]."""
    quantile = (torch.arange(count) + 0.5) / count
    return torch.erfinv(2 * quantile - 1) * 2**0.5
