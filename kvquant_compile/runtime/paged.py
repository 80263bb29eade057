"""The pages of a cache and the block table that finds them, shared by copy-on-write.

Sequences of a cache, and caches that were forked from one another, may share pages. Nothing is
copied when that comes about; before the next step :meth:`PagedStorage.prepare` gives every sequence
pages of its own from where it may write on, which is its last, incomplete page at most.

While no page is shared (``private``), and every page is in the table, nothing here waits for the
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.pages import gather_pages
from kvquant_compile.runtime.layer import QuantizedLayer
from kvquant_compile.runtime.paging import clear_pages, copy_pages, separate

# How far beyond the present a reserved cache allocates at once, in tokens of a sequence: a
# generation that stops early wastes no more, and a long one grows about once in so many steps.
AHEAD = 1024


class PagedStorage:
    """Storage of the sequences of a cache.

    Args:
        layers: of the cache; their slabs of pages grow alike.
        dtype: the model's.
        device: where everything lies.

    Attributes:
        batch: sequences; 0 before the first step.
        table: int32 [B, n], page of every 64 tokens.
        positions: int32 [B, 64 n], see :mod:`kvquant_compile.lowering.ops`.
        lengths: int32 [B], tokens stored.
        token: replaced with any tensor; while it is the same object all keep their addresses.
        private: whether every page is in one cell of the table, and no other cache's.
        settled: whether every sequence may write on where it ends.
        owned: bool [pages] on the host: pages that may be written; the others are another
            cache's too.
    """

    def __init__(
        self, layers: Sequence[QuantizedLayer], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers, self.dtype, self.device = list(layers), dtype, device
        self.late = max((layer.layout.late for layer in self.layers), default=0)
        self.reset()

    def reset(self) -> None:
        """Forget everything and let go of the pages."""
        for layer in self.layers:
            layer.slabs, layer.sinks = [], torch.empty(0)
        self.batch, self.private, self.settled = 0, True, True
        self.owned = torch.empty(0, dtype=torch.bool)
        self.token = object()
        self.table, self.positions = (self._integers(0, 0) for _ in range(2))
        self.lengths = self._integers(0)

    def start(self, batch: int) -> None:
        """Have so many sequences, all empty."""
        self.batch, self.token = batch, object()
        self.table, self.positions = (self._integers(batch, 0) for _ in range(2))
        self.lengths = self._integers(batch)

    def adopt(self, table: Tensor, positions: Tensor, lengths: Tensor) -> None:
        """Take over a block table of all pages [0, P) that the layers have, with what belongs to
        it; shapes and dtypes as of the attributes."""
        pages = sum(len(slab) for slab in self.layers[0].slabs)
        self.batch, self.token = len(lengths), object()
        self.owned = torch.ones(pages, dtype=torch.bool)
        self.private = self.settled = table.unique().numel() == table.numel() == pages
        moved = (tensor.to(self.device, copy=True) for tensor in (table, positions, lengths))
        self.table, self.positions, self.lengths = moved

    def prepare(self, columns: int, reserved: int = 0) -> None:
        """Have pages for ``columns`` tokens of every sequence, which it may write from its end on.

        Args:
            columns: needed by the next step.
            reserved: columns of which is known that they will come.
        """
        added = 0
        if columns > self.table.shape[1] * PAGE_TOKENS:
            added = self._added(columns, reserved)
        if not self.private:
            self._separate(added)
        elif added:
            start, count = self.owned.numel(), self.batch * added
            ids = torch.arange(start, start + count, dtype=torch.int32, device=self.device)
            self._allocate(count)
            self._replace(torch.cat([self.table, ids.view(self.batch, added)], 1))

    def select(self, rows: Tensor) -> None:
        """Keep the sequences ``rows`` int64 [n], in this order, repeats allowed. Those that come
        of one share its pages."""
        counts = torch.bincount(rows.cpu(), minlength=self.batch)
        positions, lengths, table = (x[rows] for x in (self.positions, self.lengths, self.table))
        sinks = [layer.sinks.index_select(0, rows) for layer in self.layers]
        if bool((counts != 1).any()):
            self.private = self.settled = False
        if rows.numel() == self.batch:
            self.positions.copy_(positions)
            self.lengths.copy_(lengths)
            self.table.copy_(table)
            for layer, kept in zip(self.layers, sinks, strict=True):
                layer.sinks.copy_(kept)
            return
        self.batch, self.token = rows.numel(), object()
        self.positions, self.lengths, self.table = positions, lengths, table
        for layer, kept in zip(self.layers, sinks, strict=True):
            layer.sinks = kept

    def lend(self, other: PagedStorage, rows: Tensor) -> None:
        """Make the sequences ``rows`` int64 [n] those of an empty storage.

        Pages that are full are shared, what this storage may still write to is copied: nothing
        of its own changes place.
        """
        used = self._pages_in_use()
        other.start(rows.numel())
        other.table = self.table[rows, :used]
        other.positions = self.positions[rows, : used * PAGE_TOKENS]
        other.lengths = self.lengths[rows]
        for theirs, mine in zip(other.layers, self.layers, strict=True):
            theirs.slabs, theirs.sinks = list(mine.slabs), mine.sinks.index_select(0, rows)
        other.owned = torch.zeros_like(self.owned)
        other.private = other.settled = self.private = False
        other._separate(0)
        shared = other.table.flatten().long().cpu()
        self.owned = self.owned.clone()
        self.owned[shared[shared < self.owned.numel()]] = False

    def unsettle(self) -> None:
        """Note that sequences have become shorter."""
        self.settled = self.private

    def compact(self) -> None:
        """Free the pages that are in no cell, where they are half of all and no other cache's."""
        ids, places = self.table.unique(return_inverse=True)
        if 2 * ids.numel() > self.owned.numel() or not bool(self.owned.all()):
            return
        slabs = [gather_pages(layer.slabs, ids.long()[None])[0] for layer in self.layers]
        for layer, slab in zip(self.layers, slabs, strict=True):
            layer.slabs = [slab.transpose(0, 1).contiguous()]
        self.table = places.to(torch.int32)
        self.owned = torch.ones(ids.numel(), dtype=torch.bool)
        self.private = ids.numel() == self.table.numel()
        self.settled = self.settled or self.private

    def nbytes(self) -> int:
        """Bytes of pages, exact tokens, block table, positions and lengths; pages that other
        caches share included."""
        own = sum(t.nbytes for t in (self.table, self.positions, self.lengths))
        return own + sum(layer.nbytes() for layer in self.layers)

    def _added(self, columns: int, reserved: int) -> int:
        """Pages to add to every sequence for ``columns`` tokens.

        What is reserved counts where more is to come. Otherwise the first allocation is exact and
        later ones add a sixteenth at least, so that the number of slabs stays logarithmic in the
        length.
        """
        have = self.table.shape[1]
        reserved = min(reserved, columns + max(AHEAD, columns // 16))
        if reserved >= columns:
            return -(-reserved // PAGE_TOKENS) - have
        sixteenth = self.owned.numel() // (16 * self.batch)
        return max(-(-columns // PAGE_TOKENS) - have, sixteenth)

    def _separate(self, added: int) -> None:
        """:meth:`prepare` where pages are shared, or free to be used again."""
        if self.settled and not added:
            return
        lengths = self.lengths.cpu()
        first = (lengths - self.late).clamp(min=0) // PAGE_TOKENS
        grown = torch.nn.functional.pad(self.table.cpu(), (0, added), value=-1)
        found = separate(grown, first, lengths, self.owned)
        if found.missing:
            self._allocate(found.missing)
        for layer in self.layers:
            copy_pages(layer.slabs, found.sources, found.targets)
            # Zeros, not garbage: a NaN in an unused slot would survive its zero softmax weight.
            clear_pages(layer.slabs, found.cleared)
        if added:
            self._replace(found.table.to(self.device))
        else:
            self.table.copy_(found.table)
        self.settled = True

    def _allocate(self, count: int) -> None:
        """Add a slab of so many pages to every layer; to none if it fails."""
        rows, device, dtype = self.batch, self.device, self.dtype
        slabs = [layer.new_slab(count, device) for layer in self.layers]
        sinks = [layer.new_sinks(rows, device, dtype) for layer in self.layers if not layer.slabs]
        for i, layer in enumerate(self.layers):
            layer.sinks = layer.sinks if layer.slabs else sinks[i]
            layer.slabs = [*layer.slabs, slabs[i]]
        self.owned = torch.cat([self.owned, torch.ones(count, dtype=torch.bool)])
        self.token = object()

    def _replace(self, table: Tensor) -> None:
        """Take a wider table, and positions as wide."""
        more = table.shape[1] * PAGE_TOKENS - self.positions.shape[1]
        fresh = self.positions.new_zeros(self.batch, more)
        self.positions = torch.cat([self.positions, fresh], 1)
        self.table, self.token = table, object()

    def _pages_in_use(self) -> int:
        """Columns of the table that hold tokens."""
        longest = int(self.lengths.max()) if self.batch else 0
        return -(-longest // PAGE_TOKENS)

    def _integers(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=self.device)
