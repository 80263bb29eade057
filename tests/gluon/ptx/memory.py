"""Global memory: a buffer of the host, in which every allocation has its exact bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tests.gluon.ptx.errors import BadAccess
from tests.gluon.ptx.operands import TYPES, Lanes

GAP = 256
"""Bytes between allocations, and the multiple that they begin at."""

SIZES = {"byte": 1, "half": 2, "word": 4, "long": 8}
Combine: TypeAlias = Callable[[Any, Any], Any]
"""What an atomic makes of a word and its operand."""

DTYPES = TYPES | {"byte": np.uint8}


class Memory:
    """Allocations in ``capacity`` bytes; addresses are the host's own."""

    def __init__(self, capacity: int) -> None:
        self.data = np.zeros(capacity // GAP * GAP + GAP, np.uint8)
        skip = -self.data.ctypes.data % GAP
        self.data = self.data[skip : skip + capacity // GAP * GAP]
        self.base = self.data.ctypes.data
        self._known = np.zeros(self.data.size + 16, bool)
        self._next = GAP

    def place(self, array: NDArray[Any]) -> int:
        """Copy an array to an allocation of its own; its address."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = self._next
        if start + data.size > self.data.size:
            raise MemoryError(f"{self.data.size} bytes of memory are too few")
        self.data[start : start + data.size] = data
        self._known[start : start + data.size] = True
        self._next = -(-(start + data.size + GAP) // GAP) * GAP
        return self.base + start

    def view(self, address: int, size: int) -> NDArray[np.uint8]:
        """The bytes at an address, which must lie in one allocation."""
        start = address - self.base
        if start < 0 or not self._known[start : start + size].all() or size < 0:
            raise BadAccess(f"{size} bytes at {address - self.base:#x} are not allocated")
        return self.data[start : start + size]

    def load(self, addresses: Lanes, kind: str, count: int) -> list[Lanes]:
        """``count`` values behind every address."""
        at = self._places(addresses, SIZES[kind], count)
        cells = self.data.view(DTYPES[kind])
        return [cells[at + k] for k in range(count)]

    def store(self, addresses: Lanes, kind: str, values: list[Lanes]) -> None:
        """Write values behind every address."""
        at = self._places(addresses, SIZES[kind], len(values))
        cells = self.data.view(DTYPES[kind])
        for k, value in enumerate(values):
            cells[at + k] = value

    def combine(self, addresses: Lanes, values: Lanes, function: Combine) -> Lanes:
        """Atomically change words, one lane after the other; what they were."""
        at = self._places(addresses, 4, 1)
        return combine_in_turn(self.data.view(np.uint32), at, values, function)

    def _places(self, addresses: Lanes, size: int, count: int) -> Lanes:
        """Indices of the first value of every lane."""
        start = addresses - self.base
        check_aligned(addresses, size * count)
        inside = (start >= 0) & (start < self.data.size)
        start = np.where(inside, start, 0)
        inside &= self._known[start] & self._known[start + size * count - 1]
        if not inside.all():
            lost = (addresses - self.base)[~inside]
            raise BadAccess(f"{size * count} bytes at {int(lost[0]):#x} are not allocated")
        return start // size


def check_aligned(addresses: Lanes, size: int) -> None:
    """Raise where an address is no multiple of the access's size."""
    if (addresses & (size - 1)).any():
        raise BadAccess(f"address {int(addresses[(addresses & (size - 1)) != 0][0]):#x} % {size}")


def combine_in_turn(cells: Lanes, at: Lanes, values: Lanes, function: Combine) -> Lanes:
    """``cells[at] = function(cells[at], values)`` lane by lane; the values before."""
    before = np.empty_like(values)
    for lane, (place, value) in enumerate(zip(at.tolist(), values, strict=True)):
        before[lane] = cells[place]
        cells[place] = function(cells[place], value)
    return before
