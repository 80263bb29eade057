"""Hand-written decoders, one adapter per calling convention; the rest sees one :class:`Decoder`.

======================  ==============================================  ========================
convention              call                                            where the cache is
======================  ==============================================  ========================
functional              ``forward(ids, past) -> (logits, past)``        ``past``, pairs of
                                                                        tensors
start position          ``forward(ids, start) -> logits``, ``start`` a  tensors of the model's
                        number, or positions int64 [S]                  modules, written in place
cache object            ``forward(ids, cache) -> logits`` or            attributes of ``cache``
                        ``(logits, cache)``
======================  ==============================================  ========================
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvquant_compile.capture.state import (
    CacheLeaf,
    Snapshot,
    cache_state,
)
from kvquant_compile.errors import UnsupportedModelError

PAST, TOKENS = 5, 6
# Tokens that a trial caches at most.
MOST_TRIED = 1024
CONVENTIONS = (
    "Write forward(ids, past) -> (logits, past) with past one (key, value) pair per layer, or None"
    " at first, grown by torch.cat; forward(ids, start) with caches in buffers [B, tokens, H, D]"
    " or [B, H, tokens, D]; or forward(ids, cache) with such tensors in a cache object."
)


def unlike_conventions(model: nn.Module, why: str) -> UnsupportedModelError:
    """The refusal of a model of another convention."""
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be captured", why=why, do=CONVENTIONS
    )


@dataclass(eq=False)
class Decoder(abc.ABC):
    """A decoder with the inputs that start it.

    Attributes:
        model: the user's module.
        ids: int64 [B, at least 11], to try it on.
        leaves: where its caches are, once :meth:`observe` has run.
    """

    convention: ClassVar[str]
    model: nn.Module
    ids: Tensor
    leaves: tuple[CacheLeaf, ...] = field(default=(), init=False)

    @property
    def capacity(self) -> int:
        """Tokens that the decoder itself can cache; 0 for any number."""
        return min((leaf.capacity for leaf in self.leaves), default=0)

    @abc.abstractmethod
    def empty(self) -> Any:
        """A cache without tokens, as :meth:`call` takes it."""

    @abc.abstractmethod
    def call(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        """One step of the decoder itself: logits [B, S, vocab], and the cache after it."""

    @abc.abstractmethod
    def observe(self) -> None:
        """Find the leaves by running the decoder.

        Raises:
            UnsupportedModelError: its cache is kept in another way.
        """

    @abc.abstractmethod
    def example(self) -> list[Tensor]:
        """The leaves after :data:`PAST` tokens of 2 sequences, fresh copies."""

    @abc.abstractmethod
    def step(self, ids: Tensor, past: int | torch.SymInt, caches: list[Tensor]) -> list[Tensor]:
        """For tracing: logits and the leaves after a step, from the leaves before it."""

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Whatever calls inside the block leave in the model's own state is undone after it."""
        yield

    def longest(self, tokens: int) -> int:
        """How many tokens the decoder takes at once: ``tokens``, or as many as it has room and
        tables for, found by halving."""
        tokens = min(tokens, self.capacity or tokens)
        while tokens > PAST + TOKENS:
            try:
                self.prefill(self.ids[:, :1].expand(-1, tokens))
                return tokens
            except (RuntimeError, IndexError, ValueError, AssertionError):
                tokens //= 2
        return PAST + TOKENS

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of a sequence from its start."""
        return self.call(ids, self.empty())[0]


@dataclass(eq=False)
class Functional(Decoder):
    """``forward(ids, past) -> (logits, past)``."""

    convention: ClassVar[str] = "functional"
    given: Any = None
    spec: Any = field(default=None, init=False)

    def empty(self) -> Any:
        """None, or the empty cache that was given."""
        return self.given

    def call(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        """See the base class."""
        logits, grown = self.model(ids, past)
        return logits, grown

    def observe(self) -> None:
        """See the base class."""
        past = self.call(self.ids[:, :PAST], self.empty())[1]
        longer = self.call(self.ids[:, : PAST + 1], self.empty())[1]
        _, self.spec = pytree.tree_flatten(past)
        state = cache_state(_flat(past), _flat(longer), PAST)
        pairs = isinstance(past, (list, tuple)) and all(
            isinstance(layer, (list, tuple)) and len(layer) == 2 for layer in past
        )
        if not pairs or not past or len(state.leaves) != 2 * len(past):
            raise unlike_conventions(
                self.model, "its cache is no list of (key, value) pairs [B, H, S, D]"
            )
        self.leaves = state.leaves

    def example(self) -> list[Tensor]:
        """See the base class."""
        past = self.call(self.ids[:, :PAST], self.empty())[1]
        return [leaf.clone() for leaf in pytree.tree_leaves(past)]

    def step(self, ids: Tensor, past: int | torch.SymInt, caches: list[Tensor]) -> list[Tensor]:
        """See the base class."""
        logits, grown = self.model(ids, pytree.tree_unflatten(caches, self.spec))
        return [logits, *pytree.tree_leaves(grown)]


def _flat(past: Any) -> Snapshot:
    return {(("item", i),): leaf for i, leaf in enumerate(pytree.tree_leaves(past))}
