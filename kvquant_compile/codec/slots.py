"""Outlier slots: a fixed number of elements of every (token, head) kept exactly.

A slot is a channel index and the float16 residual that the dense code leaves there (dense-and-
sparse, KVQuant section 3.4, with a fixed count instead of a threshold). Slots are a set: their
order means nothing. Finite residuals beyond float16 saturate; NaN and infinities propagate.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT16_MAX = 65504.0


def to_float16(x: Tensor) -> Tensor:
    """Round to float16; finite values saturate, infinities and NaN stay."""
    finite = x.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return torch.where(torch.isinf(x), x, finite).to(torch.float16)


def index_dtype(dim: int) -> torch.dtype:
    """Type of a slot's channel index: uint8 up to 256 channels, int16 beyond."""
    return torch.uint8 if dim <= 256 else torch.int16


def largest(score: Tensor, count: int) -> Tensor:
    """Channels of the ``count`` largest scores, ascending; NaN counts as largest.

    Of equal scores the lower channel is taken, so that every device picks the same.

    Args:
        score: float [..., D], at least 0 or NaN.
        count: slots, at most D.

    Returns:
        ``index_dtype(D)`` [..., count].
    """
    if count == 0:
        return score.new_empty((*score.shape[:-1], 0), dtype=index_dtype(score.shape[-1]))
    found = [score.argmax(-1, keepdim=True)]
    for _ in range(1, count):
        score = score.scatter(-1, found[-1], -1.0)
        found.append(score.argmax(-1, keepdim=True))
    index = found[0] if count == 1 else torch.cat(found, -1).sort(-1).values
    return index.to(index_dtype(score.shape[-1]))


def gather_residual(residual: Tensor, index: Tensor) -> Tensor:
    """The float16 residuals at slots: float32 [..., D], index [..., m] -> float16 [..., m]."""
    return to_float16(torch.gather(residual, -1, index.long()))


def add_residual_(dense: Tensor, index: Tensor, residual: Tensor) -> Tensor:
    """Add slot residuals in place: float32 [..., D], index [..., m], float16 [..., m]."""
    return dense.scatter_add_(-1, index.long(), residual.to(dense.dtype))


def inlier_range(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The narrowest range that leaves ``count`` elements of every row out.

    Every split of the removed elements between the two ends is tried.

    Args:
        x: float32 [..., D], D > count.
        count: elements left out.

    Returns:
        lowest and highest kept element, float32 [..., 1]; NaN where too many elements are NaN.
    """
    if count == 0:
        return torch.aminmax(x, dim=-1, keepdim=True)
    low = x.topk(count + 1, dim=-1, largest=False).values
    high = x.topk(count + 1, dim=-1).values.flip(-1)
    split = (high - low).argmin(-1, keepdim=True)
    return torch.gather(low, -1, split), torch.gather(high, -1, split)
