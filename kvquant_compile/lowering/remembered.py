"""What was made for a tensor, kept for exactly as long as that tensor lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Remembered(Generic[T]):
    """Values by the identity of a tensor; they go when it goes."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], T]] = {}

    def get(self, anchor: Tensor, make: Callable[[], T]) -> T:
        """The value of a tensor, made at the first call."""
        key = id(anchor)
        found = self._known.get(key)
        if found is not None and found[0]() is anchor:
            return found[1]
        made = make()
        self._known[key] = (weakref.ref(anchor, lambda _: self._known.pop(key, None)), made)
        return made
