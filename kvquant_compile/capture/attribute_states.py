"""Modules that keep a recurrent state in an attribute of their own, whatever cache they are given.

Such a model has one state for all of its caches. Here each cache gets its own: while a leaf runs,
its attributes hold what the cache keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvquant_compile.capture.embedding import random_embedded
from kvquant_compile.capture.state import Path, at, places, put

_KEPT = "kvquant_kept"


def kept_in(cache: Cache) -> dict[str, Tensor]:
    """Tensors [B, ...] that a cache keeps for us, by name, beside its own."""
    kept: dict[str, Tensor] = cache.__dict__.setdefault(_KEPT, {})
    return kept


@dataclass(frozen=True, eq=False)
class AttributeState:
    """A tensor [B, ...] in an attribute, which is None before the first token.

    Attributes:
        owner: the module that is called; the attribute is its own, or one below it.
        path: from the owner.
        name: the path from the backbone, dotted.
    """

    owner: nn.Module
    path: Path
    name: str

    def get(self) -> Tensor | None:
        """What the attribute holds."""
        value: Tensor | None = at(self.owner, self.path)
        return value

    def set(self, value: Tensor | None) -> None:
        """Make the attribute hold a state."""
        put(self.owner, self.path, value)


@contextmanager
def held_by(cache: Cache, states: Sequence[AttributeState]) -> Iterator[None]:
    """Attributes hold what the cache keeps inside the block, and what they held before after it."""
    kept = kept_in(cache) if states else {}
    before = [state.get() for state in states]
    try:
        for state in states:
            state.set(kept.get(state.name))
        yield
        for state in states:
            value = state.get()
            if value is not None:
                kept[state.name] = value
    finally:
        for state, value in zip(states, before, strict=True):
            state.set(value)


Marks = dict[Path, tuple[Tensor, int]]


def marks(backbone: nn.Module) -> Marks:
    """The tensors in attributes of modules that are no parameters or buffers, and how often each
    was changed in place."""
    found = ((path, value) for path, value in places(backbone) if isinstance(value, Tensor))
    return {
        path: (x, 0 if x.is_inference() else x._version)  # these are not counted
        for path, x in found
        if not _is_buffer(backbone, path)
    }


def _is_buffer(root: nn.Module, path: Path) -> bool:
    *before, (_, key) = path
    owner = at(root, tuple(before))
    return isinstance(owner, nn.Module) and key in owner._buffers


def attribute_states(
    backbone: PreTrainedModel, like: Tensor, before: Marks
) -> tuple[AttributeState, ...]:
    """The states that a run has left in attributes: one row per sequence, of a fixed size.

    Tensors of other sizes are what modules remember of their last call, not of all tokens.

    Args:
        backbone: has run since ``before``.
        like: a parameter of it.
        before: the marks of that time.
    """
    now = marks(backbone).items()
    changed = [path for path, (x, times) in now if not _same(before.get(path), x, times)]
    if not changed:
        return ()
    shapes = [_shapes(backbone, like, changed, *size) for size in ((2, 5), (2, 6), (3, 5))]
    kept = [
        path
        for path, first, longer, wider in zip(changed, *shapes, strict=True)
        if first and first == longer and first[0] == 2 and wider == (3, *first[1:])
    ]
    owners = [_owner(backbone, path) for path in kept]
    return tuple(
        AttributeState(
            at(backbone, owner), path[len(owner) :], ".".join(str(key) for _, key in path)
        )
        for path in kept
        for owner in [min((o for o in owners if path[: len(o)] == o), key=len)]
    )


def _same(before: tuple[Tensor, int] | None, now: Tensor, times: int) -> bool:
    return before is not None and before[0] is now and before[1] == times


def _shapes(
    backbone: PreTrainedModel, like: Tensor, paths: Sequence[Path], batch: int, tokens: int
) -> list[tuple[int, ...]]:
    """What the attributes hold after a run; () for no tensor."""
    fed = random_embedded(backbone, like, batch, tokens, seed=0)
    backbone(inputs_embeds=fed.pop("hidden"), **fed, use_cache=True)
    values = [at(backbone, path) for path in paths]
    return [tuple(value.shape) if isinstance(value, Tensor) else () for value in values]


def _owner(root: nn.Module, path: Path) -> Path:
    """The path of the innermost module on the way."""
    return max(
        (path[:i] for i in range(len(path)) if isinstance(at(root, path[:i]), nn.Module)), key=len
    )
