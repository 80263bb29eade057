"""Which stored tokens a step's queries see, for the torch path."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_slots(
    slots: Tensor, first: int, hidden: Tensor, limit: Tensor, window: int, chunk: int
) -> Tensor | None:
    """Which of the slots ``first ..`` each query sees: bool [B, S, count]; None when all do.

    ``hidden`` [B, count] are slots that nobody sees.
    """
    count = hidden.shape[1]
    place = torch.arange(first, first + count, device=slots.device)
    low, high = int(slots.min()), int(limit.min())
    whole = low >= first + count - 1 and high >= first + count and not window and not chunk
    if whole and not bool(hidden.any()):
        return None
    seen = (place <= slots[..., None]) & (place < limit[:, None, None]) & ~hidden[:, None]
    if chunk:
        seen = seen & same_chunk(slots[..., None], place, chunk)
    return seen & (place > slots[..., None] - window) if window else seen


def both(one: Tensor | None, other: Tensor) -> Tensor:
    """Both masks, bool of one shape; None hides nothing."""
    return other if one is None else one & other


def left_to_pages(slots: Tensor, places: Tensor, history: Tensor, recent: int) -> Tensor:
    """Which slots the pages give to each query, bool [B, S, n]: all before the step, where the ring
    is put in, and of the step's own those that are not among the query's last."""
    before = places < history[:, None]
    return before[:, None] | (places[:, None] <= slots[..., None] - recent)


def same_chunk(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Whether slots, of shapes that broadcast, lie in one chunk of so many."""
    return queries.div(chunk, rounding_mode="floor") == keys.div(chunk, rounding_mode="floor")


def places_of(first: int, keys: Tensor) -> Tensor:
    """Slots of a block's keys, [1, N]."""
    return torch.arange(first, first + keys.shape[2], device=keys.device)[None]
