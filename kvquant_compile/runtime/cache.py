"""The quantised key-value cache, as transformers' ``Cache``.

Tokens live in pages of 64, allocated as they come and reached through a block table; a page never
moves. Every sequence of a batch is compact: padding is not stored, and a token's *slot* is its
rank among the real tokens of its sequence. ``columns`` counts what transformers counts, padding
included.

A step changes nothing that is visible until :meth:`QuantizedCache.commit`: it writes into slots
at or above the sequence's length only, so a step that fails in the middle leaves the cache as it
was. (Recurrent states of hybrid models are the exception: their modules change them in place.)

Device state is changed in place where its shape stays; where not, ``storage`` is replaced: while
it is the same object every tensor has kept its address, so that a captured graph may be replayed.
A step without padding waits for the device once, to compare a mask, or without one never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from kvquant_compile.codec.formats import Layout
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.errors import CacheError
from kvquant_compile.runtime.columns import Columns
from kvquant_compile.runtime.identity import Identity
from kvquant_compile.runtime.layer import QuantizedLayer

# How far beyond the present a reserved cache allocates at once, in tokens of a sequence: a
# generation that stops early wastes no more, and a long one grows about once in so many steps.
AHEAD = 1024


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass's view of the cache; shapes as in :mod:`kvquant_compile.lowering.ops`.

    Attributes:
        slots: see there.
        history: see there; the cache's own tensor, which :meth:`QuantizedCache.commit` advances.
        lengths: int32 [B], tokens per sequence once the step is committed.
        real: which of the step's tokens are no padding, bool [B, S]; None when all are real.
    """

    slots: Tensor
    history: Tensor
    lengths: Tensor
    real: Tensor | None


class QuantizedCache(Cache):
    """The cache of an optimised model; made by the model, or by ``new_cache(model)``.

    Args:
        layouts: page layout of every cache layer, in order.
        dtype: the model's dtype (exact tokens are kept in it).
        device: where the pages live.
        most: columns that the model can place, where it has tables of positions; None: any.
        states: makes the cache of layers with a recurrent state, which are kept as they are.
        identity: what :meth:`save` binds files to; None where caches cannot be saved.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        dtype: torch.dtype,
        device: torch.device,
        most: int | None = None,
        states: Callable[[], Cache | None] = lambda: None,
        identity: Callable[[], Identity] | None = None,
    ) -> None:
        super().__init__(layers=[QuantizedLayer(layout, self) for layout in layouts])
        self.dtype, self.device, self.most = dtype, device, most
        self.new_states, self.identity = states, identity
        self.reset()

    @property
    def pages(self) -> list[QuantizedLayer]:
        """The layers, typed."""
        return cast("list[QuantizedLayer]", self.layers)

    def reset(self) -> None:
        """Forget everything and free the pages."""
        for layer in self.pages:
            layer.slabs, layer.sinks = [], torch.empty(0)
        self.columns, self.batch, self.reserved = 0, 0, 0
        self.masks = Columns()
        self.states = self.new_states()
        self.storage = object()
        self.table = torch.empty(0, 0, dtype=torch.int32, device=self.device)
        self.positions = torch.empty(0, 0, dtype=torch.int32, device=self.device)
        self.lengths = torch.empty(0, dtype=torch.int32, device=self.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached columns, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns after the step, offset)."""
        return self.columns + query_length, 0

    def reserve(self, tokens: int) -> None:
        """Let the next allocation reach for ``tokens`` columns, of which ``generate`` knows that
        they will come; :data:`AHEAD` of the step's at most, or a sixteenth more."""
        self.reserved = tokens

    def adopt(self, table: Tensor, positions: Tensor, lengths: Tensor, columns: int) -> None:
        """Take over another cache's bookkeeping; the caller brings pages, sinks and masks.

        Args:
            table: int32 [B, n]; no page twice.
            positions: int32 [B, 64 n].
            lengths: int32 [B].
            columns: cached ones, padding included.
        """
        self.batch, self.columns, self.storage = len(lengths), columns, object()
        moved = (tensor.to(self.device, copy=True) for tensor in (table, positions, lengths))
        self.table, self.positions, self.lengths = moved

    def begin(self, positions: Tensor, attention_mask: Tensor | None) -> Step:
        """Prepare a step: allocate its pages and decide where its tokens go.

        Args:
            positions: int [B, S] RoPE positions of the step's tokens.
            attention_mask: [B, columns + S], nonzero for real tokens; None when none is padded.

        Raises:
            CacheError: the batch size differs from the cached one, the mask contradicts what
                was cached, or the model's tables of positions are too short.
        """
        real = self.admit(positions.shape[0], positions.shape[1], attention_mask)
        return self.place(positions, real)

    @torch.inference_mode(False)  # a later step may write outside inference mode
    def admit(self, batch: int, steps: int, attention_mask: Tensor | None) -> Tensor | None:
        """The host's half of :meth:`begin`: check the step and have pages for it.

        Returns:
            Which of the step's tokens are real, bool [B, S]; None when all are.

        Raises:
            CacheError: as :meth:`begin`.
        """
        self._check_room(steps)
        self._check_batch(batch)
        real = None
        if attention_mask is not None:
            self._check_mask(attention_mask, batch, steps)
            mask = attention_mask.to(self.device)
            real = self.masks.read(mask, self.columns, self.positions)
        self._grow(batch, self.columns + steps)
        return real

    @torch.inference_mode(False)
    def place(self, positions: Tensor, real: Tensor | None = None) -> Step:
        """The device's half of :meth:`begin`: slots of the step's tokens, their positions stored.
        Without padding (``real`` is None) no wait, address or shape depends on what is cached."""
        steps = positions.shape[1]
        if real is None:
            slots = self.lengths[:, None] + torch.arange(
                steps, dtype=torch.int32, device=self.device
            )
            self.positions.scatter_(1, slots.long(), positions.to(torch.int32))
            return Step(slots, self.lengths, self.lengths + steps, None)
        rank = real.cumsum(1, dtype=torch.int32) - 1
        slots = torch.where(real, self.lengths[:, None] + rank, -1)
        row, step = real.nonzero(as_tuple=True)
        self.positions[row, slots[row, step].long()] = positions[row, step].to(torch.int32)
        return Step(slots, self.lengths, self.lengths + real.sum(1, dtype=torch.int32), real)

    @torch.inference_mode(False)
    def commit(self, step: Step) -> None:
        """Make a step's tokens part of the cache."""
        self.advance(step)
        self.count(step.slots.shape[1], step.real)

    def advance(self, step: Step) -> None:
        """The device's half of :meth:`commit`."""
        self.lengths.copy_(step.lengths)

    @torch.inference_mode(False)
    def count(self, steps: int, real: Tensor | None = None) -> None:
        """The host's half of :meth:`commit`."""
        self.masks.add(real, self.columns, steps)
        self.columns += steps

    @torch.inference_mode(False)
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns (a negative number, or 0).

        Raises:
            CacheError: the number is positive, or more than is cached, or a recurrent state
                cannot go back.
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
        if self.states is not None:
            raise CacheError(
                f"cannot crop by {tokens_to_remove}",
                why="layers of the model keep a recurrent state, which cannot go back",
                do="Start again from an empty cache.",
            )
        dropped = self.masks.drop(self.columns, count)
        self.lengths.sub_(count if dropped is None else dropped)
        self.columns -= count

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
        self.masks.select(rows)
        for state in self.recurrent_layers():
            state.reorder_cache(rows)  # type: ignore[arg-type]
        positions, lengths = self.positions[rows], self.lengths[rows]
        width, batch = self.table.shape[1], rows.numel()
        table = torch.arange(batch * width, dtype=torch.int32, device=self.device)
        if batch != self.batch:
            self.batch, self.storage = batch, object()
            self.positions, self.lengths = positions, lengths
            self.table = table.view(batch, width)
            return
        self.positions.copy_(positions)
        self.lengths.copy_(lengths)
        self.table.copy_(table.view(batch, width))

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file, which :func:`kvquant_compile.load_cache` reads.

        Raises:
            CacheError: the cache belongs to no optimised model.
            ArtifactError: the file cannot be written.
        """
        from kvquant_compile.runtime.saved import save

        if self.identity is None:
            raise CacheError(
                "this cache cannot be saved",
                why="it was not made by an optimised model, so that nothing says what it is of",
                do="Use the cache that the model returns, or kvquant_compile.new_cache(model).",
            )
        save(self, self.identity(), path)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: pickled pages could be loaded into any model.

        Raises:
            CacheError: always.
        """
        raise CacheError(
            "a quantised cache cannot be pickled",
            why="its pages mean nothing without the tables they were coded with",
            do="Use cache.save(path) and kvquant_compile.load_cache(path, model).",
        )

    def nbytes(self) -> int:
        """Every byte the cache has allocated: pages, exact tokens, block table, positions, and
        recurrent states."""
        kept = [
            tensor
            for state in self.recurrent_layers()
            for tensor in (*state.conv_states.values(), *state.recurrent_states.values())
        ]
        return self._paged_bytes() + sum(t.nbytes for t in kept if t is not None)

    def _paged_bytes(self) -> int:
        shared = (self.table, self.positions, self.lengths)
        total = sum(t.nbytes for t in shared) + self.masks.nbytes()
        return total + sum(layer.nbytes() for layer in self.pages)

    def recurrent_layers(self) -> list[LinearAttentionLayer]:
        """The layers that keep a recurrent state, in order."""
        layers = [] if self.states is None else self.states.layers
        return [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]

    def effective_bits(self) -> float:
        """Allocated bits per cached key or value element, all but recurrent states counted."""
        tokens = int(self.lengths.sum())
        widths = (x.layout.heads * (x.layout.key_dim + x.layout.value_dim) for x in self.pages)
        elements = tokens * sum(widths)
        return 8 * self._paged_bytes() / elements if elements else 0.0

    def __repr__(self) -> str:
        kinds = {x.layout.kind for x in self.pages}
        return (
            f"QuantizedCache({len(self.layers)} layers {'/'.join(sorted(kinds))}, batch "
            f"{self.batch}, {self.columns} tokens, {self.nbytes():,} bytes)"
        )

    def _check_batch(self, batch: int) -> None:
        if self.batch == 0:
            self.batch, self.storage = batch, object()
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.table = self.table.new_empty(batch, 0)
            self.positions = self.positions.new_empty(batch, 0)
        elif batch != self.batch:
            raise CacheError(
                f"a batch of {batch} does not continue this cache",
                why=f"it holds {self.batch} sequences",
                do="Use one cache per batch, or batch_repeat_interleave / batch_select_indices.",
            )

    def _check_room(self, steps: int) -> None:
        if self.most is not None and self.columns + steps > self.most:
            raise CacheError(
                f"{self.columns + steps} tokens are more than the model has positions for",
                why=f"its tables of positions end after {self.most}",
                do="Stop there, or give the model longer ones.",
            )

    def _check_mask(self, mask: Tensor, batch: int, steps: int) -> None:
        if mask.shape != (batch, self.columns + steps):
            raise CacheError(
                f"an attention mask of shape {tuple(mask.shape)} does not fit",
                why=f"{self.columns} cached and {steps} new tokens in {batch} sequences need "
                f"({batch}, {self.columns + steps})",
                do="Pass a 2-D mask over cached and new tokens, or none.",
            )

    def _grow(self, batch: int, columns: int) -> None:
        """Have pages for ``columns`` tokens of every sequence."""
        have = self.table.shape[1]
        if columns <= have * PAGE_TOKENS:
            return
        added = self._added(columns)
        start = batch * have
        ids = torch.arange(start, start + batch * added, dtype=torch.int32, device=self.device)
        for layer in self.pages:
            layer.allocate(batch, batch * added, self.device, self.dtype)
        self.table = torch.cat([self.table, ids.view(batch, added)], 1)
        fresh = self.positions.new_zeros(batch, added * PAGE_TOKENS)
        self.positions = torch.cat([self.positions, fresh], 1)
        self.storage = object()

    def _added(self, columns: int) -> int:
        """Pages to add to every sequence for ``columns`` tokens.

        What is reserved counts where more is to come. Otherwise the first allocation is exact and
        later ones add a sixteenth at least, so that the number of slabs stays logarithmic in the
        length.
        """
        have = self.table.shape[1]
        reserved = min(self.reserved, columns + max(AHEAD, columns // 16))
        if reserved >= columns:
            return -(-reserved // PAGE_TOKENS) - have
        return max(-(-columns // PAGE_TOKENS) - have, have // 16)
