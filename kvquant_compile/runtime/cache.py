"""The quantised key-value cache, as transformers' ``Cache``.

Tokens live in pages of 64, allocated as they come and reached through a block table; a page never
moves. Every sequence of a batch is compact: padding is not stored, and a token's *slot* is its
rank among the real tokens of its sequence. ``columns`` counts what transformers counts, padding
included.

A step changes nothing that is visible until :meth:`QuantizedCache.commit`: it writes into slots
at or above the sequence's length only, so a step that fails in the middle leaves the cache as it
was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.errors import CacheError


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass's view of the cache; shapes as in :mod:`kvquant_compile.lowering.ops`.

    Attributes:
        slots, history: see there.
        lengths: int32 [B], tokens per sequence once the step is committed.
        columns: cached columns once the step is committed.
        valid: bool [B, columns] once committed, or None where nothing is padding.
    """

    slots: Tensor
    history: Tensor
    lengths: Tensor
    columns: int
    valid: Tensor | None


class QuantizedLayer(CacheLayerMixin):
    """One layer's pages. Reading and writing happens in the ops, not through ``update``."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, layout: PageLayout, owner: QuantizedCache) -> None:
        super().__init__()
        self.layout, self.owner = layout, owner
        self.slabs: list[Tensor] = []
        self.sinks: Tensor = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage comes with the first step."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Refused: full-precision keys and values never exist.

        Raises:
            CacheError: always.
        """
        raise CacheError(
            "a quantised cache cannot be updated with full-precision keys and values",
            why="it is filled by the rewritten graph only, which hands it keys before RoPE",
            do="Pass it to the optimised model, or use transformers' DynamicCache with another.",
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns after the step, offset)."""
        return self.owner.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Cached columns, padding included."""
        return self.owner.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def allocate(self, batch: int, pages: int, device: torch.device, dtype: torch.dtype) -> None:
        """Add a slab of ``pages`` zeroed pages, and the sinks with the first."""
        layout = self.layout
        if not self.slabs:
            width = padded(layout.key_dim) + layout.value_dim
            shape = (batch, layout.heads, layout.spec.sink_tokens, width)
            self.sinks = torch.zeros(shape, dtype=dtype, device=device)
        # Zeros, not garbage: a NaN in an unused slot would survive its zero softmax weight.
        shape_pages = (pages, layout.heads, layout.page_bytes)
        self.slabs.append(torch.zeros(shape_pages, dtype=torch.uint8, device=device))

    def select(self, ids: Tensor, rows: Tensor) -> None:
        """Keep copies of the pages ``ids`` and of the rows' sinks, in this order."""
        stacked = self.slabs[0] if len(self.slabs) == 1 else torch.cat(self.slabs)
        self.slabs = [stacked.index_select(0, ids)]
        self.sinks = self.sinks.index_select(0, rows)

    def nbytes(self) -> int:
        """Allocated bytes of this layer."""
        return sum(slab.nbytes for slab in self.slabs) + self.sinks.nbytes


class QuantizedCache(Cache):
    """The cache of an optimised model; made by the model, or by ``new_cache(model)``.

    Args:
        layouts: page layout of every cache layer, in order.
        dtype: the model's dtype (exact tokens are kept in it).
        device: where the pages live.
    """

    def __init__(
        self, layouts: Sequence[PageLayout], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[QuantizedLayer(layout, self) for layout in layouts])
        self.dtype, self.device = dtype, device
        self.reset()

    @property
    def pages(self) -> list[QuantizedLayer]:
        """The layers, typed."""
        return cast("list[QuantizedLayer]", self.layers)

    def reset(self) -> None:
        """Forget everything and free the pages."""
        for layer in self.pages:
            layer.slabs, layer.sinks = [], torch.empty(0)
        self.columns, self.batch = 0, 0
        self.hides = False
        self.valid: Tensor | None = None
        self.table = torch.empty(0, 0, dtype=torch.int32, device=self.device)
        self.positions = torch.empty(0, 0, dtype=torch.int32, device=self.device)
        self.lengths = torch.empty(0, dtype=torch.int32, device=self.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached columns, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns after the step, offset)."""
        return self.columns + query_length, 0

    @torch.inference_mode(False)  # a later step may write outside inference mode
    def begin(self, positions: Tensor, attention_mask: Tensor | None) -> Step:
        """Prepare a step: allocate its pages and decide where its tokens go.

        Args:
            positions: int [B, S] RoPE positions of the step's tokens.
            attention_mask: [B, columns + S], nonzero for real tokens; None when none is padded.

        Raises:
            CacheError: the batch size differs from the cached one, or the mask contradicts
                what was cached.
        """
        batch, steps = positions.shape
        self._check_batch(batch)
        columns = self.columns + steps
        real = self._real_tokens(attention_mask, batch, steps)
        self._grow(batch, columns)
        if real is None:
            slots = self.lengths[:, None] + torch.arange(
                steps, dtype=torch.int32, device=self.device
            )
            lengths, valid = self.lengths + steps, self._extended(None, batch, steps)
        else:
            rank = real.cumsum(1, dtype=torch.int32) - 1
            slots = torch.where(real, self.lengths[:, None] + rank, -1)
            lengths = self.lengths + real.sum(1, dtype=torch.int32)
            valid = self._extended(real, batch, steps)
        self._store_positions(slots, positions)
        return Step(slots, self.lengths, lengths, columns, valid)

    def commit(self, step: Step) -> None:
        """Make a step's tokens part of the cache."""
        self.lengths, self.columns, self.valid = step.lengths, step.columns, step.valid

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns (a negative number, or 0).

        Raises:
            CacheError: the number is positive, or more than is cached.
        """
        count = -tokens_to_remove
        if not 0 <= count <= self.columns:
            raise CacheError(
                f"cannot crop by {tokens_to_remove}",
                why=f"{self.columns} tokens are cached, and crop takes minus the number to drop",
                do="Pass a number between -length and 0.",
            )
        if count == 0:
            return
        dropped = self.lengths.new_full((self.batch,), count)
        if self.valid is not None:
            dropped = self.valid[:, -count:].sum(1, dtype=torch.int32)
            self.valid = self.valid[:, :-count]
        self.lengths, self.columns = self.lengths - dropped, self.columns - count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i a copy of row ``beam_idx[i]`` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        rows = torch.arange(self.batch, device=self.device).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    @torch.inference_mode(False)
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` [n], in this order, repeats allowed."""
        if self.batch == 0:
            return
        rows = torch.arange(self.batch, device=self.device)[indices.to(self.device)]
        ids = self.table[rows].flatten().long()
        for layer in self.pages:
            layer.select(ids, rows)
        width = self.table.shape[1]
        self.batch = rows.numel()
        self.table = torch.arange(self.batch * width, dtype=torch.int32, device=self.device).view(
            self.batch, width
        )
        self.positions, self.lengths = self.positions[rows], self.lengths[rows]
        self.valid = None if self.valid is None else self.valid[rows]

    def nbytes(self) -> int:
        """Every byte the cache has allocated: pages, exact tokens, block table, positions."""
        shared = (self.table, self.positions, self.lengths)
        total = sum(t.nbytes for t in shared) + sum(layer.nbytes() for layer in self.pages)
        return total + (0 if self.valid is None else self.valid.nbytes)

    def effective_bits(self) -> float:
        """Allocated bits per cached key or value element, everything counted."""
        tokens = int(self.lengths.sum())
        widths = (x.layout.heads * (x.layout.key_dim + x.layout.value_dim) for x in self.pages)
        elements = tokens * sum(widths)
        return 8 * self.nbytes() / elements if elements else 0.0

    def __repr__(self) -> str:
        kinds = {f"k{x.layout.spec.key_bits}v{x.layout.spec.value_bits}" for x in self.pages}
        return (
            f"QuantizedCache({len(self.layers)} layers {'/'.join(sorted(kinds))}, batch "
            f"{self.batch}, {self.columns} tokens, {self.nbytes():,} bytes)"
        )

    def _check_batch(self, batch: int) -> None:
        if self.batch == 0:
            self.batch = batch
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.table = self.table.new_empty(batch, 0)
            self.positions = self.positions.new_empty(batch, 0)
        elif batch != self.batch:
            raise CacheError(
                f"a batch of {batch} does not continue this cache",
                why=f"it holds {self.batch} sequences",
                do="Use one cache per batch, or batch_repeat_interleave / batch_select_indices.",
            )

    def _real_tokens(self, mask: Tensor | None, batch: int, steps: int) -> Tensor | None:
        """Which of the step's tokens are no padding, bool [B, S]; None when all are real."""
        if mask is None:
            return None
        if mask.shape != (batch, self.columns + steps):
            raise CacheError(
                f"an attention mask of shape {tuple(mask.shape)} does not fit",
                why=f"{self.columns} cached and {steps} new tokens in {batch} sequences need "
                f"({batch}, {self.columns + steps})",
                do="Pass a 2-D mask over cached and new tokens, or none.",
            )
        seen = mask.to(self.device).bool()
        self._hide(seen[:, : self.columns])
        real = seen[:, self.columns :]
        return None if bool(real.all()) else real

    def _hide(self, seen: Tensor) -> None:
        """Hide cached tokens that the mask now leaves out (a finished row's fillers, in the next
        turn) and show those it brings back. A hidden token's position p is stored as -1 - p."""
        stored = torch.ones_like(seen) if self.valid is None else self.valid
        if bool((seen & ~stored).any()):
            raise CacheError(
                "the attention mask contradicts the cache",
                why="it marks cached padding as real, and padding is not stored",
                do="Keep the mask's zeros as they were when the tokens were cached.",
            )
        hidden = stored & ~seen
        if not self.hides and not bool(hidden.any()):
            return
        self.hides = True
        slots = stored.cumsum(1) - 1
        row, column = stored.nonzero(as_tuple=True)
        slot = slots[row, column]
        known = self.positions[row, slot]
        shown = torch.where(known < 0, -1 - known, known)
        self.positions[row, slot] = torch.where(hidden[row, column], -1 - shown, shown)

    def _extended(self, real: Tensor | None, batch: int, steps: int) -> Tensor | None:
        if real is None and self.valid is None:
            return None
        past = self.valid
        if past is None:
            past = torch.ones(batch, self.columns, dtype=torch.bool, device=self.device)
        if real is None:
            real = torch.ones(batch, steps, dtype=torch.bool, device=self.device)
        return torch.cat([past, real], 1)

    def _grow(self, batch: int, columns: int) -> None:
        """Have pages for ``columns`` tokens of every sequence.

        The first allocation is exact; later ones add a sixteenth at least, so that the number of
        slabs stays logarithmic in the length.
        """
        have = self.table.shape[1]
        need = -(-columns // PAGE_TOKENS)
        if need <= have:
            return
        added = max(need - have, have // 16)
        start = batch * have
        ids = torch.arange(start, start + batch * added, dtype=torch.int32, device=self.device)
        for layer in self.pages:
            layer.allocate(batch, batch * added, self.device, self.dtype)
        self.table = torch.cat([self.table, ids.view(batch, added)], 1)
        fresh = self.positions.new_zeros(batch, added * PAGE_TOKENS)
        self.positions = torch.cat([self.positions, fresh], 1)

    def _store_positions(self, slots: Tensor, positions: Tensor) -> None:
        row, step = (slots >= 0).nonzero(as_tuple=True)
        self.positions[row, slots[row, step].long()] = positions[row, step].to(torch.int32)
