"""The quantised key-value cache, as transformers' ``Cache``.

Tokens live in pages of 64, allocated as they come and reached through a block table; a page never
moves, and sequences may share it (:mod:`kvquant_compile.runtime.paged`). Every sequence of a batch
is compact: padding is not stored, and a token's *slot* is its rank among the real tokens of its
sequence. ``columns`` counts what transformers counts, padding included.

A step changes nothing that is visible until :meth:`QuantizedCache.commit`: it writes into slots
at or above the sequence's length only, so a step that fails in the middle leaves the cache as it
was. What cannot be taken back (recurrent states of hybrid models are changed in place) leaves a
cache that says so on its next use.

Device state is changed in place where its shape stays; where not, ``storage`` is replaced: while
it is the same object every tensor has kept its address, so that a captured graph may be replayed.
A step without padding waits for the device once, to compare a mask, or without one never.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicIndexedLayer, LinearAttentionLayer

from kvquant_compile.codec.formats import Layout
from kvquant_compile.errors import CacheError
from kvquant_compile.runtime import states
from kvquant_compile.runtime.cache_checks import (
    check_alive,
    check_batch,
    check_crop,
    check_mask,
    check_room,
)
from kvquant_compile.runtime.columns import Columns
from kvquant_compile.runtime.identity import Identity
from kvquant_compile.runtime.layer import QuantizedLayer
from kvquant_compile.runtime.paged import PagedStorage


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
        self.paged = PagedStorage(self.pages, dtype, device)
        self.reset()

    @property
    def pages(self) -> list[QuantizedLayer]:
        """The layers, typed."""
        return cast("list[QuantizedLayer]", self.layers)

    def reset(self) -> None:
        """Forget everything and free the pages."""
        self.paged.reset()
        self.columns, self.reserved, self.broken = 0, 0, ""
        self.masks = Columns()
        self.states = self.new_states()

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first step."""
        return self.batch or -1

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first step."""
        return self.paged.batch

    @property
    def table(self) -> Tensor:
        """Page of every 64 tokens, int32 [B, n]."""
        return self.paged.table

    @property
    def positions(self) -> Tensor:
        """Position of every stored token, int32 [B, 64 n]; negative where it is hidden."""
        return self.paged.positions

    @property
    def lengths(self) -> Tensor:
        """Tokens stored, int32 [B]."""
        return self.paged.lengths

    @property
    def storage(self) -> object:
        """Another object whenever a tensor of the cache has another address."""
        return self.paged.token

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached columns, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns after the step, offset)."""
        return self.columns + query_length, 0

    def reserve(self, tokens: int) -> None:
        """Let the next allocation reach for ``tokens`` columns, of which ``generate`` knows that
        they will come; see :mod:`kvquant_compile.runtime.paged` for how far at once."""
        self.reserved = tokens

    def begin(self, positions: Tensor, attention_mask: Tensor | None) -> Step:
        """Prepare a step: allocate its pages and decide where its tokens go.

        Args:
            positions: int [B, S] RoPE positions of the step's tokens.
            attention_mask: [B, columns + S], nonzero for real tokens; None when none is padded,
                nor hidden any more.

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
        check_alive(self.broken)
        check_room(self.columns + steps, self.most)
        if self.columns:
            check_batch(batch, self.batch)
        if attention_mask is not None:
            check_mask(attention_mask, batch, self.columns, steps)
        if batch != self.batch:
            self.paged.reset()
            self.paged.start(batch)
            self.masks = Columns()
        real = None
        if attention_mask is not None:
            mask = attention_mask.to(self.device)
            real = self.masks.read(mask, self.columns, self.positions)
        else:
            self.masks.show_all(self.columns, self.positions)
        self.paged.prepare(self.columns + steps, self.reserved)
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
        check_alive(self.broken)
        check_crop(tokens_to_remove, self.columns, self.states is not None)
        count = -tokens_to_remove
        if count == 0:
            return
        dropped = self.masks.drop(self.columns, count)
        self.lengths.sub_(count if dropped is None else dropped)
        self.columns -= count
        self.paged.unsettle()

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
        check_alive(self.broken)
        if self.batch == 0:
            return
        rows = torch.arange(self.batch, device=self.device)[indices.to(self.device)]
        fewer = rows.numel() < self.batch
        with self.undividable("choosing sequences"):
            self.paged.select(rows)
            self.masks.select(rows)
            states.select_rows(self.states, rows)
        if fewer:
            self.paged.compact()

    @contextmanager
    def undividable(self, what: str) -> Iterator[None]:
        """If the block raises, the cache refuses to be used until it is reset."""
        try:
            yield
        except BaseException:
            self.broken = what
            raise

    @torch.inference_mode(False)
    def fork(self, count: int = 1) -> QuantizedCache:
        """A cache with every sequence ``count`` times, to be continued apart from this one.

        Both share the pages that are full; what either adds goes to pages of its own
        (copy-on-write), so that many continuations of one prompt hold it once. This cache may be
        continued, cropped, reset or dropped as before.

        Raises:
            CacheError: ``count`` is no positive number, or the cache can no longer be used.
        """
        check_alive(self.broken)
        if count < 1:
            raise CacheError(
                f"cannot fork a cache {count} times",
                why="a cache without sequences holds nothing",
                do="Pass the number of continuations, 1 or more.",
            )
        layouts = [layer.layout for layer in self.pages]
        other = QuantizedCache(
            layouts, self.dtype, self.device, self.most, self.new_states, self.identity
        )
        other.columns = self.columns
        if self.batch:
            rows = torch.arange(self.batch, device=self.device).repeat_interleave(count)
            self.paged.lend(other.paged, rows)
            other.masks = self.masks.copied(rows)
            other.states = copy.deepcopy(self.states)
            states.select_rows(other.states, rows)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedCache:
        """A fork: equal to a copy in all but memory."""
        return self.fork()

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file, which :func:`kvquant_compile.load_cache` reads.

        Raises:
            CacheError: the cache belongs to no optimised model, can no longer be used, or keeps
                states in a class of the model's own.
            ArtifactError: the file cannot be written.
        """
        from kvquant_compile.runtime.saved import save

        check_alive(self.broken)
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
        """Every byte the cache has allocated: pages, exact tokens, block table, positions,
        recurrent states and the keys of indices."""
        kept = states.recurrent_bytes(self.states) + states.index_bytes(self.states)
        return self._paged_bytes() + kept

    def _paged_bytes(self) -> int:
        return self.paged.nbytes() + self.masks.nbytes()

    def recurrent_layers(self) -> list[LinearAttentionLayer]:
        """The layers that keep a recurrent state, in order."""
        return states.recurrent_layers(self.states)

    def indexed_layers(self) -> list[DynamicIndexedLayer]:
        """The layers that keep an index of their tokens (sparse attention), in order."""
        return states.indexed_layers(self.states)

    def effective_bits(self) -> float:
        """Allocated bits per cached key or value element; recurrent states and indices, which
        stay what they are in the original, are not counted."""
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
