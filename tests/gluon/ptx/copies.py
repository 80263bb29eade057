"""Copies into shared memory: bulk ones, counted by mbarriers, and those of lanes, in groups."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.gluon.ptx.errors import Hazard
from tests.gluon.ptx.operands import Lanes
from tests.gluon.ptx.shared import Shared

PATIENCE = 100_000
"""Polls of a barrier after which nobody will come."""


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes are there."""

    count: int
    phase: int = 0
    missing: int = 0
    bytes: int = 0
    polls: int = 0
    flying: list[tuple[slice, NDArray[np.uint8]]] = field(default_factory=list)
    landed: list[slice] = field(default_factory=list)
    complete: list[slice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.missing = self.count


class Barriers:
    """All mbarriers of a program by address; copies land late, in a random order."""

    def __init__(self, shared: Shared, chance: random.Random) -> None:
        self._shared, self._chance = shared, chance
        self._known: dict[int, Barrier] = {}

    def create(self, address: int, count: int) -> None:
        """``mbarrier.init``."""
        self._known[address] = Barrier(count)

    def arrive(self, address: int, announced: int) -> None:
        """``mbarrier.arrive.expect_tx``."""
        barrier = self._at(address)
        barrier.missing -= 1
        barrier.bytes += announced
        self._advance(barrier)

    def copy(self, address: int, span: slice, source: NDArray[np.uint8]) -> None:
        """Start a copy; its bytes arrive when somebody has waited long enough."""
        self._at(address).flying.append((span, source))

    def poll(self, address: int, parity: int, warp: int) -> bool:
        """``mbarrier.try_wait.parity``: whether the phase of that parity is over.

        A warp that learns so may look at what was copied.
        """
        barrier = self._at(address)
        if barrier.flying and self._chance.random() < 0.5:
            self._land(barrier)
        if barrier.phase & 1 == parity & 1:
            barrier.polls += 1
            if barrier.polls > PATIENCE:
                raise Hazard(f"waits for ever: {barrier.missing} arrivals, {barrier.bytes} bytes")
            return False
        barrier.polls = 0
        if not barrier.flying and not barrier.landed:
            for span in barrier.complete:
                self._shared.unseen[warp, span] = False
        return True

    def check_end(self) -> None:
        """A program must not end before its copies."""
        if any(barrier.flying for barrier in self._known.values()):
            raise Hazard("the program ends while a copy is on its way")

    def _at(self, address: int) -> Barrier:
        if address not in self._known:
            raise Hazard(f"no mbarrier was made at {address:#x}")
        return self._known[address]

    def _land(self, barrier: Barrier) -> None:
        span, source = barrier.flying.pop(self._chance.randrange(len(barrier.flying)))
        self._shared.data[span] = source
        barrier.bytes -= len(source)
        barrier.landed.append(span)
        self._advance(barrier)

    def _advance(self, barrier: Barrier) -> None:
        if barrier.missing == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.missing = barrier.count
            barrier.complete, barrier.landed = barrier.landed, []


@dataclass(frozen=True)
class LaneCopy:
    """Sixteen bytes by each of some lanes: four words behind every address."""

    lanes: Lanes
    addresses: Lanes
    words: list[Lanes]


class Groups:
    """Copies of one warp's lanes: since the last commit, and in committed groups by age."""

    def __init__(self, shared: Shared, warp: int) -> None:
        self._shared, self._warp = shared, warp
        self._open: list[LaneCopy] = []
        self._committed: list[list[LaneCopy]] = []

    def copy(self, copy: LaneCopy) -> None:
        """``cp.async``; the bytes stay out of reach until the group has been waited for."""
        self._shared.begin_lane_copies(self._warp, copy.lanes, copy.addresses)
        self._open.append(copy)

    def commit(self) -> None:
        """``cp.async.commit_group``."""
        self._committed.append(self._open)
        self._open = []

    def wait(self, pending: int) -> None:
        """``cp.async.wait_group``: all but the last ``pending`` groups arrive."""
        while len(self._committed) > pending:
            for copy in self._committed.pop(0):
                self._shared.land_lane_copies(self._warp, copy.lanes, copy.addresses, copy.words)

    def check_end(self) -> None:
        """A warp must not end before its copies."""
        if self._open or any(self._committed):
            raise Hazard("the program ends while a copy is on its way")
