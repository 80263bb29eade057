"""A position bias of attention scores, read off the weights that zero queries give.

Only biases that are linear in the distance are read (ALiBi, arXiv 2108.12409); whether a site has
such a bias is decided by comparing it with the attention that it would mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvquant_compile.capture.site import SiteFunction

# Windows are looked for among this many keys.
_WINDOWS = 512
# Weights down to exp(-40) are still far from float32's smallest normal number.
_DEPTH = 40


def read_slopes(function: SiteFunction) -> tuple[float, ...]:
    """Slopes of a bias that is linear in the key's place; empty when zero queries see all alike.

    The slope of a head is read between the last key and the farthest one whose weight is still a
    normal number, so that its error times a distance is that of the model's own arithmetic.
    """
    steps = _log_weights(function, 9)[:, -4:].diff(dim=1)
    if not bool((steps[torch.isfinite(steps)].abs() > 1e-5).any()):
        return ()
    return tuple(_slope(function, head, step) for head, step in enumerate(steps[:, -1].tolist()))


def _slope(function: SiteFunction, head: int, step: float) -> float:
    if not math.isfinite(step):
        raise ValueError("the last two keys are not both visible")
    keys = 2 + int(min(256, _DEPTH / max(abs(step), 1e-9)))
    weights = _log_weights(function, keys)[head]
    line = weights[-1] - step * torch.arange(keys - 1, -1, -1)
    # Within a window, and near the line that the last step foretells.
    usable = torch.isfinite(weights) & ((weights - line).abs() < 1e-2)
    first = int(usable.nonzero()[0])
    return _snapped_slope(float((weights[-1] - weights[first]) / (keys - 1 - first)))


def _snapped_slope(slope: float) -> float:
    """The power of two that is meant, in all of ALiBi's schedules; or the slope as measured."""
    exponent = math.log2(abs(slope)) if slope else 0.0
    nearest = round(exponent * 64) / 64
    close = slope and abs(nearest - exponent) < 1e-5
    return math.copysign(2.0**nearest, slope) if close else slope


def _log_weights(function: SiteFunction, keys: int) -> Tensor:
    """Logarithm of every weight of the last query, for a zero query: float64 [heads, keys]."""
    q, k, v = function.zeros(1, keys - 1)
    parts = []
    for start in range(0, keys, function.out_width):
        count = min(function.out_width, keys - start)
        v.zero_()
        v[:, :, start + torch.arange(count), torch.arange(count)] = 1
        parts.append(function(q, k, v)[0, :, 0, :count].double().cpu())
    return torch.cat(parts, 1).log()


def window_of_biased(function: SiteFunction, slopes: tuple[float, ...]) -> int:
    """The window where weights fall with the distance, seen through the flattest head."""
    flattest = min(map(abs, slopes))
    head = [abs(slope) for slope in slopes].index(flattest)
    keys = int(min(_WINDOWS, 60 / max(flattest, 1e-9)))
    seen = int(torch.isfinite(_log_weights(function, keys)[head]).sum())
    return 0 if seen == keys else seen
