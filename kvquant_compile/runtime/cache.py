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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvquant_compile.codec.formats import Layout
from kvquant_compile.errors import CacheError
from kvquant_compile.runtime import states
from kvquant_compile.runtime.cache_checks import (
    check_alive,
    check_batch,
    check_crop,
    check_fork,
    check_mask,
    check_room,
)
from kvquant_compile.runtime.columns import Columns
from kvquant_compile.runtime.contents import CacheContents
from kvquant_compile.runtime.identity import Identity
from kvquant_compile.runtime.step import Step


class QuantizedCache(CacheContents):
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
        super().__init__(layouts, dtype, device, states)
        self.most, self.identity = most, identity
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the pages."""
        self.paged.reset()
        self.columns, self.reserved, self.broken = 0, 0, ""
        self.masks = Columns()
        self.states = self.new_states()

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
        step = Step.after(self.lengths, positions.shape[1], real)
        step.write_positions(positions, self.positions)
        return step

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
        check_fork(count)
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
