"""What was made for some tensors, kept for exactly as long as all of them live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Remembered(Generic[T]):
    """Values by the identity of tensors; they go when one of these goes.

    Whatever a value is made of has to be among its tensors: layers may share some of their tables,
    as two mixtures of widths do whose keys have one width and whose values have not.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], T]] = {}

    def get(self, anchors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """The value of these tensors, made at the first call."""
        key = tuple(map(id, anchors))
        found = self._known.get(key)
        if found is not None:
            return found[1]
        made = make()
        gone = lambda _: self._known.pop(key, None)  # noqa: E731
        self._known[key] = ([weakref.ref(anchor, gone) for anchor in anchors], made)
        return made
