"""The exact tokens beside the pages: leading ones, and a ring of the last ones.

Both lie in one tensor ``sinks`` [B, H, rows, width] of the model's dtype: first the leading tokens,
then ``ring`` rows, token n in row ``n % ring`` of them, then one row whose first eight bytes say
which tokens the ring holds. Neither crops nor failed steps are told to it: what it holds only ever
shrinks to what nothing has overwritten, so that after a crop fewer tokens are exact, never wrong
ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_exact(sinks: Tensor, tokens: Tensor, slots: Tensor, leading: int, ring: int) -> None:
    """Write a step's leading and last tokens, and what the ring then holds.

    Earlier tokens that are still in the ring stay.

    Args:
        sinks: see the module.
        tokens: keys and values side by side, [B, H, S, width].
        slots: int [B, S], -1 for padding; the real ones of a row are consecutive.
        leading: exact leading tokens.
        ring: exact last tokens.
    """
    row, step = ((slots >= 0) & (slots < leading)).nonzero(as_tuple=True)
    if row.numel():
        sinks[row, :, slots[row, step].long()] = tokens[row, :, step].to(sinks.dtype)
    if not ring:
        return
    end = slots.amax(1).long() + 1
    start = end - (slots >= 0).sum(1)
    row, step = (slots >= (end[:, None] - ring).clamp_min(leading)).nonzero(as_tuple=True)
    line = leading + slots[row, step].long() % ring
    sinks[row, :, line] = tokens[row, :, step].to(sinks.dtype)
    low, before = ring_span(sinks)
    none = start == end
    low = torch.where(none | (low < start), low, start)
    end = torch.where(none, before, end)
    state = torch.stack([torch.maximum(low, end - ring), end], 1)
    sinks[:, 0, -1, : _state_width(sinks)] = state.to(torch.int32).view(sinks.dtype)


def ring_span(sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens ``low`` to ``end - 1`` that the ring of every sequence holds, int64 [B] each: the
    bits of the last row's first elements, as two int32."""
    part = sinks[:, 0, -1, : _state_width(sinks)]
    state = part.clone(memory_format=torch.contiguous_format).view(torch.int32).long()
    return state[:, 0], state[:, 1]


def ring_slots(sinks: Tensor, ring: int) -> Tensor:
    """The slot of the token in every row of the ring, int64 [B, ring]; -1 where there is none."""
    low, end = (x[:, None] for x in ring_span(sinks))
    line = torch.arange(ring, device=sinks.device)
    slots = low + (line - low) % ring
    return torch.where(slots < end, slots, -1)


def put_exact(
    keys: Tensor, values: Tensor, sinks: Tensor, first: int, leading: int, ring: int
) -> None:
    """Overwrite the tokens of some pages that are kept exactly.

    Args:
        keys, values: float32 [B, H, N, ...] of the slots ``first ..``, changed in place.
        sinks, leading, ring: as of :func:`keep_exact`.
    """
    width, count = keys.shape[-1], keys.shape[2]
    if ring:
        slots = ring_slots(sinks, ring)
        row, line = ((slots >= first) & (slots < first + count)).nonzero(as_tuple=True)
        found = sinks[row, :, leading + line].to(keys.dtype)
        place = slots[row, line] - first
        keys[row, :, place], values[row, :, place] = found[..., :width], found[..., width:]
    if leading and not first:
        exact = sinks[:, :, :leading]
        keys[:, :, :leading], values[:, :, :leading] = exact[..., :width], exact[..., width:]


def _state_width(sinks: Tensor) -> int:
    """Elements of the model's dtype that two int32 take."""
    return 8 // sinks.element_size()
