"""What was made for some tensors, kept for exactly as long as all of them live."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Remembered(Generic[T]):
    """Values by the identity of tensors; they go when one of these goes.

    Whatever a value is made of has to be among its tensors: layers may share some of their tables,
    as two mixtures of widths do whose keys have one width and whose values have not.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[list[weakref.ref[Tensor]], T]] = {}

    def get(self, anchors: Sequence[Tensor], make: Callable[[], T], of: Hashable = None) -> T:
        """The value of these tensors, made at the first call; ``of`` is what it depends on
        besides."""
        key = (of, *map(id, anchors))
        found = self._known.get(key)
        if found is not None:
            return found[1]
        made = make()
        gone = functools.partial(self._forget, key)
        self._known[key] = ([weakref.ref(anchor, gone) for anchor in anchors], made)
        return made

    def _forget(self, key: Hashable, gone: weakref.ref[Tensor]) -> None:
        self._known.pop(key, None)
