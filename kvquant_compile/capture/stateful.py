"""Decoders that keep their cache themselves, or in a cache object: a call changes a state."""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvquant_compile.capture.decoder import (
    MOST_TRIED,
    PAST,
    Decoder,
    Functional,
    unlike_conventions,
)
from kvquant_compile.capture.state import CacheState, at, cache_state, put, put_back, snapshot

_LOGITS, _CACHE = "logits", "cache"


@dataclass(eq=False)
class Stateful(Decoder):
    """A decoder whose calls change a state: its own, or that of a cache object.

    Attributes:
        state: what a call changes, once :meth:`observe` has run.
        shapes: of the leaves.
        pattern: what the model returns, as a tree of logits, caches and None.
        traced: the ``past`` of :meth:`example`, whose leaves and counters a trace replaces.
    """

    state: CacheState = field(default=CacheState((), (), ()), init=False)
    shapes: tuple[torch.Size, ...] = field(default=(), init=False)
    pattern: tuple[Any, tuple[str | None, ...]] = field(default=(None, ()), init=False)
    traced: Any = field(default=None, init=False)

    @abc.abstractmethod
    def root(self, past: Any) -> Any:
        """What the state is below, for a ``past`` of :meth:`call`."""

    @abc.abstractmethod
    def result(self, ids: Tensor, past: Any) -> Any:
        """What the model returns; its state changes."""

    @abc.abstractmethod
    def at_length(self, past: Any, tokens: Any) -> Any:
        """The ``past`` of a state with so many tokens."""

    def call(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        """See the base class."""
        logits = self.logits_of(self.result(ids, past), past, ids)
        return logits, self.at_length(past, self.tokens_of(past) + ids.shape[1])

    def tokens_of(self, past: Any) -> int:
        """Tokens cached in a ``past``."""
        return 0

    def observe(self) -> None:
        """See the base class."""
        found = []
        for tokens in (PAST, PAST + 1):
            past = self.empty()
            before = snapshot(self.root(past))
            self.call(self.ids[:, :tokens], past)
            found.append(snapshot(self.root(past)))
            put_back(self.root(past), before)
        self.state = cache_state(found[0], found[1], PAST)
        self.leaves = self.state.leaves
        self.shapes = tuple(found[0][leaf.path].shape for leaf in self.leaves)
        if not self.leaves or len(self.leaves) % 2:
            why = f"of its state, {len(self.leaves)} tensors were found to hold keys or values"
            raise unlike_conventions(self.model, why + (self.state.other and "; ")
                                     + self.state.other)  # fmt: skip

    def example(self) -> list[Tensor]:
        """See the base class."""
        past = self.empty()
        before = snapshot(self.root(past))
        self.call(self.ids[:, :PAST], past)
        tensors = [at(self.root(past), leaf.path)[:1] for leaf in self.leaves]
        tensors = [tensor.repeat(2, 1, 1, 1).clone() for tensor in tensors]
        self.traced = past
        if self.root(past) is self.model:
            put_back(self.model, before)
        return tensors

    def step(self, ids: Tensor, past: int | torch.SymInt, caches: list[Tensor]) -> list[Tensor]:
        """See the base class."""
        given = self.at_length(self.traced, past)
        root = self.root(given)
        paths = [*(leaf.path for leaf in self.leaves), *self.state.counters,
                 *self.state.counting_tensors]  # fmt: skip
        before = [at(root, path) for path in paths]
        try:
            for leaf, tensor in zip(self.leaves, caches, strict=True):
                put(root, leaf.path, tensor.clone() if leaf.capacity else tensor)
            for path in self.state.counters:
                put(root, path, past)
            for path in self.state.counting_tensors:
                put(root, path, torch.full_like(at(root, path), past))  # type: ignore[arg-type]
            logits = self.logits_of(self.result(ids, given), given, ids)
            return [logits, *(at(root, leaf.path) for leaf in self.leaves)]
        finally:
            for path, value in zip(paths, before, strict=True):
                put(root, path, value)

    def logits_of(self, result: Any, past: Any, ids: Tensor) -> Tensor:
        """The logits among what the model returns.

        Raises:
            UnsupportedModelError: it returns other tensors too, or no logits of every token.
        """
        leaves, spec = pytree.tree_flatten(result, is_leaf=lambda x: _is_cache(x, past))
        parts = [None if x is None else _CACHE if _is_cache(x, past) else _LOGITS for x in leaves]
        others = [x for x, part in zip(leaves, parts, strict=True) if part == _LOGITS]
        if len(others) != 1 or not isinstance(others[0], Tensor) or others[0].ndim != 3:
            kinds = ", ".join(type(x).__name__ for x in others)
            raise unlike_conventions(self.model, f"it returns {kinds}, not logits [B, S, vocab]")
        if others[0].shape[1] != ids.shape[1]:
            raise unlike_conventions(self.model, "it returns the logits of some tokens only")
        self.pattern = spec, tuple(parts)
        return others[0]

    def answer(self, past: Any, logits: Tensor) -> Any:
        """What the model would return with these logits and this cache."""
        spec, parts = self.pattern
        known = {_LOGITS: logits, _CACHE: past}
        return pytree.tree_unflatten(
            [None if part is None else known[part] for part in parts], spec
        )


def _is_cache(value: Any, past: Any) -> bool:
    """Whether a part of a result is the cache object, or another of its class."""
    return not isinstance(past, (int, Tensor, tuple)) and type(value) is type(past)


@dataclass(eq=False)
class StartPosition(Stateful):
    """``forward(ids, start) -> logits``; caches are tensors of the model's modules.

    Attributes:
        as_tensor: whether ``start`` is the step's positions, int64 [S], and not a number.
    """

    convention: ClassVar[str] = "start position"
    as_tensor: bool = False

    def empty(self) -> Any:
        """The start."""
        return 0

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """See the base class; the block may cache :data:`MOST_TRIED` tokens."""
        tensors = [(at(self.model, leaf.path), leaf.axis) for leaf in self.leaves]
        parts = [t.narrow(axis, 0, min(MOST_TRIED, t.shape[axis])) for t, axis in tensors]
        kept = [part.clone() for part in parts]
        paths = (*self.state.counters, *self.state.counting_tensors)
        numbers = [copy.deepcopy(at(self.model, path)) for path in paths]
        try:
            yield
        finally:
            with torch.no_grad():
                for part, content in zip(parts, kept, strict=True):
                    part.copy_(content)
            for path, number in zip(paths, numbers, strict=True):
                put(self.model, path, number)

    def root(self, past: Any) -> Any:
        """See the base class."""
        return self.model

    def tokens_of(self, past: Any) -> int:
        """See the base class."""
        return int(past)

    def at_length(self, past: Any, tokens: Any) -> Any:
        """See the base class."""
        return tokens

    def result(self, ids: Tensor, past: Any) -> Any:
        """See the base class."""
        if not self.as_tensor:
            return self.model(ids, past)
        return self.model(ids, torch.arange(past, past + ids.shape[1], device=ids.device))


@dataclass(eq=False)
class CacheObject(Stateful):
    """``forward(ids, cache)``; ``given`` is an empty cache object, which is never changed."""

    convention: ClassVar[str] = "cache object"
    given: Any = None

    def observe(self) -> None:
        """See the base class."""
        super().observe()
        if self.capacity and not (self.state.counters or self.state.counting_tensors):
            raise unlike_conventions(self.model, "nothing in its cache counts the cached tokens")

    def empty(self) -> Any:
        """A copy of the empty cache."""
        return copy.deepcopy(self.given)

    def root(self, past: Any) -> Any:
        """See the base class."""
        return past

    def at_length(self, past: Any, tokens: Any) -> Any:
        """See the base class."""
        return past

    def result(self, ids: Tensor, past: Any) -> Any:
        """See the base class."""
        return self.model(ids, past)


def decoder_of(model: nn.Module, ids: Tensor, past: Any) -> Decoder:
    """The adapter for a model by what is given as its second input.

    Args:
        model: a hand-written decoder.
        ids: int64 [B, 11 or more].
        past: None or a list of tensors, or of nothing: functional; a number or an integer tensor:
            start position; any other object, or a list of some: an empty cache object.

    Raises:
        UnsupportedModelError: the cache object cannot be copied.
    """
    plain = (Tensor, type(None))
    listed = isinstance(past, (list, tuple))
    if past is None or (listed and all(isinstance(x, plain) for x in pytree.tree_leaves(past))):
        filled = any(isinstance(x, Tensor) and x.numel() for x in pytree.tree_leaves(past))
        return Functional(model, ids, None if filled else past)
    if isinstance(past, (int, Tensor)):
        return StartPosition(model, ids, isinstance(past, Tensor))
    try:
        return CacheObject(model, ids, copy.deepcopy(past))
    except Exception as error:
        raise unlike_conventions(model, f"its cache cannot be copied: {error}") from error
