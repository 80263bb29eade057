"""Where the tokens of one forward pass go in a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass's view of the cache; shapes as in :mod:`kvquant_compile.lowering.ops`.

    Attributes:
        slots: see there.
        history: see there; the cache's own tensor, which is advanced when the step is committed.
        lengths: int32 [B], tokens per sequence once the step is committed.
        real: which of the step's tokens are no padding, bool [B, S]; None when all are real.
    """

    slots: Tensor
    history: Tensor
    lengths: Tensor
    real: Tensor | None

    @staticmethod
    def after(history: Tensor, steps: int, real: Tensor | None) -> Step:
        """The step of ``steps`` columns behind sequences of ``history`` tokens, int32 [B].

        Without padding nothing waits for the device, and no shape depends on what is cached.
        """
        if real is None:
            new = torch.arange(steps, dtype=torch.int32, device=history.device)
            return Step(history[:, None] + new, history, history + steps, None)
        rank = real.cumsum(1, dtype=torch.int32) - 1
        slots = torch.where(real, history[:, None] + rank, -1)
        return Step(slots, history, history + real.sum(1, dtype=torch.int32), real)

    def write_positions(self, positions: Tensor, stored: Tensor) -> None:
        """Put the real tokens' positions, int [B, S], into those of all slots, int32 [B, n]."""
        if self.real is None:
            stored.scatter_(1, self.slots.long(), positions.to(torch.int32))
            return
        row, step = self.real.nonzero(as_tuple=True)
        stored[row, self.slots[row, step].long()] = positions[row, step].to(torch.int32)
