"""Where the tokens of a cache stand among the columns that transformers counts."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.step import Step


def slot_columns(cache: QuantizedCache, step: Step) -> Tensor:
    """The column of every slot, a step's own included.

    Args:
        cache: has begun the step.
        step: what it answered.

    Returns:
        int64 [B, slots of the allocated pages]; the number of columns where a slot is empty.
    """
    batch, steps = step.slots.shape
    width, past = cache.positions.shape[1], cache.columns
    real = torch.ones(batch, past + steps, dtype=torch.bool, device=cache.device)
    if cache.masks.stored is not None:
        real[:, :past] = cache.masks.stored[:, :past]
    if step.real is not None:
        real[:, past:] = step.real
    rank = torch.where(real, real.cumsum(1) - 1, width)
    columns = torch.arange(past + steps, device=cache.device).expand(batch, -1)
    found = torch.full((batch, width + 1), past + steps, device=cache.device)
    return found.scatter(1, rank, columns)[:, :width]
