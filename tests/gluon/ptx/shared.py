"""A program's shared memory, which reports accesses whose result depends on timing.

Every word remembers who wrote it last and who read it last. A warp may look at what one of its
lanes wrote after ``bar.warp.sync``, at what another warp wrote after ``bar.sync``, and may
overwrite what was read on the same terms. Bytes that a copy writes are nobody's from its issue
until a warp has waited for it; a lane's own copy is then like its store.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.gluon.ptx.errors import BadAccess, Hazard
from tests.gluon.ptx.memory import DTYPES, SIZES, Combine, check_aligned, combine_in_turn
from tests.gluon.ptx.operands import SHARED_BASE, Lanes

ATOMIC = 32
"""Stands for the lane where atomics wrote: they may follow each other."""

_PROGRAM, _WARP, _EPOCH = 40, 34, 6  # a stamp's fields: epochs of the program and warp, lane


class Shared:
    """Shared memory of one program."""

    def __init__(self, size: int, warps: int) -> None:
        size = -(-size // 16) * 16
        self.data = np.full(size, 0xF7, np.uint8)
        self.unseen = np.zeros((warps, size), bool)
        self._written = np.full(size // 4, -1, np.int64)
        self._read = np.full(size // 4, -1, np.int64)
        self._program_epoch = 0
        self._warp_epochs = [0] * warps

    def warp_barrier(self, warp: int) -> None:
        """The warp's lanes see each other's accesses."""
        self._warp_epochs[warp] += 1

    def barrier(self) -> None:
        """All warps see each other's accesses, and the copies that any of them waited for."""
        self._program_epoch += 1
        self.unseen &= self.unseen.all(0)

    def load(self, warp: int, lanes: Lanes, addresses: Lanes, kind: str, count: int) -> list[Lanes]:
        """``count`` values behind every address."""
        at, words = self._places(warp, addresses, kind, count)
        self._check(self._written, warp, lanes, words, "reads what {} wrote")
        self._read[words] = self._stamp(warp, lanes)
        cells = self.data.view(DTYPES[kind])
        return [cells[at + k] for k in range(count)]

    def store(
        self, warp: int, lanes: Lanes, addresses: Lanes, kind: str, values: list[Lanes]
    ) -> None:
        """Write values behind every address."""
        at, words = self._places(warp, addresses, kind, len(values))
        self._check(self._read, warp, lanes, words, "overwrites what {} read")
        self._written[words] = self._stamp(warp, lanes)
        cells = self.data.view(DTYPES[kind])
        for k, value in enumerate(values):
            cells[at + k] = value

    def combine(
        self, warp: int, lanes: Lanes, addresses: Lanes, values: Lanes, function: Combine
    ) -> Lanes:
        """Atomically change words; what they were."""
        at, words = self._places(warp, addresses, "word", 1)
        self._check(self._written, warp, lanes, words, "changes what {} wrote", atomic=True)
        self._written[words] = self._stamp(warp, np.full_like(lanes, ATOMIC))
        return combine_in_turn(self.data.view(np.uint32), at, values, function)

    def begin_copy(self, warp: int, start: int, size: int) -> slice:
        """Take bytes from everybody; where they are."""
        span = slice(start - SHARED_BASE, start - SHARED_BASE + size)
        if span.start < 0 or span.stop > self.data.size or start % 16 or size % 16:
            raise BadAccess(f"a copy of {size} bytes to {span.start:#x} of {self.data.size:#x}")
        if self.unseen[:, span].all(0).any():
            raise Hazard("two copies to the same bytes")
        words = np.arange(span.start // 4, span.stop // 4)[:, None]
        issuer = np.full(len(words), ATOMIC, np.int64)
        self._check(self._read, warp, issuer, words, "overwrites by a copy what {} read")
        self._check(self._written, warp, issuer, words, "overwrites by a copy what {} wrote")
        self.unseen[:, span] = True
        return span

    def begin_lane_copies(self, warp: int, lanes: Lanes, addresses: Lanes) -> None:
        """Take sixteen bytes a lane from everybody."""
        start, words = self._places(warp, addresses, "word", 4)
        self._check(self._read, warp, lanes, words, "overwrites by a copy what {} read")
        self._check(self._written, warp, lanes, words, "overwrites by a copy what {} wrote")
        self.unseen[:, _bytes(start)] = True

    def land_lane_copies(
        self, warp: int, lanes: Lanes, addresses: Lanes, values: list[Lanes]
    ) -> None:
        """The copies have arrived, for the lanes that made them."""
        self.unseen[:, _bytes((addresses - SHARED_BASE) >> 2)] = False
        self.store(warp, lanes, addresses, "word", values)

    def _places(
        self, warp: int, addresses: Lanes, kind: str, count: int
    ) -> tuple[Lanes, NDArray[np.int64]]:
        """Indices of every lane's first value; of all its words, [lanes, words]."""
        size = SIZES[kind] * count
        check_aligned(addresses, size)
        start = addresses - SHARED_BASE
        if (start < 0).any() or (start + size > self.data.size).any():
            where = int(start[(start < 0) | (start + size > self.data.size)][0])
            raise BadAccess(f"{size} bytes at {where:#x} of {self.data.size:#x} shared ones")
        words = (start[:, None] >> 2) + np.arange(-(-size // 4))
        if self.unseen[warp].take(start).any() or self.unseen[warp].take(start + size - 1).any():
            raise Hazard("touches bytes of a copy that this warp has not waited for")
        return start // SIZES[kind], words

    def _stamp(self, warp: int, lanes: Lanes) -> NDArray[np.int64]:
        epochs = self._program_epoch << _PROGRAM | self._warp_epochs[warp] << _EPOCH
        return (np.int64(epochs | warp << _WARP) | lanes)[:, None]

    def _check(
        self, stamps: Lanes, warp: int, lanes: Lanes, words: Lanes, what: str, atomic: bool = False
    ) -> None:
        """Raise where a stamp belongs to another lane, and no barrier lies between."""
        found = stamps[words]
        recent = found >= self._program_epoch << _PROGRAM
        if not recent.any():
            return
        lane, other = found & 63, found >> _WARP & 63
        same_epoch = found >> _EPOCH & (1 << _WARP - _EPOCH) - 1 == self._warp_epochs[warp]
        close = (other != warp) | same_epoch & (lane != lanes[:, None])
        if atomic:
            close &= lane != ATOMIC
        if (recent & close).any():
            first = np.argwhere(recent & close)[0]
            who = f"lane {lane[tuple(first)]} of warp {other[tuple(first)]}"
            raise Hazard(f"{what.format(who)} with no barrier between")


def _bytes(words: Lanes) -> NDArray[np.int64]:
    """Indices of the sixteen bytes behind every word's."""
    return (4 * words[:, None] + np.arange(16)).ravel()
