"""Which columns of a cache hold tokens, and which of these a later mask has hidden.

*Columns* are what transformers counts, padding included; *slots* are ranks among the real tokens
of a sequence (see :mod:`kvquant_compile.runtime.cache`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.errors import CacheError


class Columns:
    """Padding and hidden tokens of a cache.

    Both buffers are bool [B, columns and spare ones]. Spare columns are True, so that appending
    real tokens changes nothing on the device, and a mask is compared with what is known in one
    operation.

    Attributes:
        stored: columns that hold a token; None while nothing was padding.
        shown: columns that hold a token which queries see; the same tensor as ``stored`` while
            no mask has hidden a token.
    """

    def __init__(self) -> None:
        self.stored: Tensor | None = None
        self.shown: Tensor | None = None

    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(buffer.nbytes for buffer in self._buffers())

    def state(self, columns: int) -> dict[str, Tensor]:
        """The buffers' first ``columns`` columns by name; without those that say nothing."""
        if self.stored is None or self.shown is None:
            return {}
        named = {"stored": self.stored, "shown": self.shown}
        if self.shown is self.stored:
            del named["shown"]
        return {name: buffer[:, :columns] for name, buffer in named.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` returned, of another cache's columns."""
        self.stored = state["stored"] if state else None
        self.shown = state.get("shown", self.stored)

    def read(self, mask: Tensor, columns: int, positions: Tensor) -> Tensor | None:
        """Take in a mask over the cached columns and a step's; hides and shows cached tokens.

        Waits for the device once where the mask says what is known and all new tokens are real,
        which is every decode step of ``generate``.

        Args:
            mask: [B, columns + S], nonzero for real tokens.
            columns: cached ones.
            positions: int32 [B, slots], of stored tokens; -1 - p where p is hidden.

        Returns:
            Which of the step's tokens are real, bool [B, S]; None when all are.

        Raises:
            CacheError: the mask marks padding as real that was not stored.
        """
        if self._known(mask):
            return None
        seen = mask.bool()
        self._hide(seen[:, :columns], positions)
        real = seen[:, columns:]
        return None if bool(real.all()) else real

    def show_all(self, columns: int, positions: Tensor) -> None:
        """Show the tokens that masks have hidden: what no mask means. Arguments as of `read`;
        padding, which is not stored, stays left out."""
        if self.stored is not None and self.shown is not self.stored:
            self._hide(self.stored[:, :columns], positions)
            self.shown = self.stored

    def add(self, real: Tensor | None, columns: int, steps: int) -> None:
        """Count a step's tokens in, after ``columns`` cached ones; ``real`` bool [B, S] or None, as
        from `read`."""
        if real is not None and self.stored is None:
            self.stored = self.shown = real.new_ones(real.shape[0], 0)
        self._reach(columns + steps)
        if real is not None:
            for buffer in self._buffers():
                buffer[:, columns : columns + steps] = real

    def drop(self, columns: int, count: int) -> Tensor | None:
        """Forget the last ``count`` of ``columns``.

        Returns:
            How many tokens these were, int32 [B]; None when all ``count`` were.
        """
        if self.stored is None:
            return None
        last = slice(columns - count, columns)
        dropped = self.stored[:, last].sum(1, dtype=torch.int32)
        for buffer in self._buffers():
            buffer[:, last] = True
        return dropped

    def select(self, rows: Tensor) -> None:
        """Keep the rows, in this order."""
        same = self.shown is self.stored
        self.stored = None if self.stored is None else self.stored[rows]
        self.shown = self.stored if same or self.shown is None else self.shown[rows]

    def copied(self, rows: Tensor) -> Columns:
        """A copy with the rows, in this order."""
        out = Columns()
        out.stored, out.shown = self.stored, self.shown
        out.select(rows)
        return out

    def _buffers(self) -> list[Tensor]:
        if self.stored is None or self.shown is None:
            return []
        return [self.stored] if self.shown is self.stored else [self.stored, self.shown]

    def _reach(self, columns: int) -> None:
        """Have at least that many columns in the buffers."""
        if self.stored is None or self.shown is None or columns <= self.stored.shape[1]:
            return
        have = self.stored.shape[1]
        extra = max(columns, have + have // 16) + PAGE_TOKENS - have
        same = self.shown is self.stored
        self.stored = pad(self.stored, (0, extra), value=True)
        self.shown = self.stored if same else pad(self.shown, (0, extra), value=True)

    def _known(self, mask: Tensor) -> bool:
        """Whether the mask shows what is shown, and new tokens only."""
        if self.shown is None:
            return bool(mask.all())
        self._reach(mask.shape[1])
        return torch.equal(mask.bool(), self.shown[:, : mask.shape[1]])

    def _hide(self, seen: Tensor, positions: Tensor) -> None:
        """Hide cached tokens that the mask leaves out (a finished row's fillers, in the next
        turn) and show those it brings back. A hidden token's position p is stored as -1 - p."""
        columns = seen.shape[1]
        stored = torch.ones_like(seen) if self.stored is None else self.stored[:, :columns]
        if bool((seen & ~stored).any()):
            raise CacheError(
                "the attention mask contradicts the cache",
                why="it marks cached padding as real, and padding is not stored",
                do="Keep the mask's zeros as they were when the tokens were cached.",
            )
        shown = stored if self.shown is None else self.shown[:, :columns]
        if torch.equal(seen, shown):
            return
        if self.stored is None:
            self.stored = self.shown = torch.ones_like(seen)
        if self.shown is self.stored:
            self.shown = self.stored.clone()
        assert self.shown is not None
        self.shown[:, :columns] = seen
        row, column = stored.nonzero(as_tuple=True)
        slot = (stored.cumsum(1) - 1)[row, column]
        known = positions[row, slot]
        plain = torch.where(known < 0, -1 - known, known)
        positions[row, slot] = torch.where(seen[row, column], plain, -1 - plain)
