"""Warps, programs and the order in which they run."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.gluon.ptx.access import Mask, Signal
from tests.gluon.ptx.copies import Barriers, Groups
from tests.gluon.ptx.errors import Divergence, PtxError
from tests.gluon.ptx.memory import Memory
from tests.gluon.ptx.operands import TYPES, WARP, Lanes
from tests.gluon.ptx.shared import Shared

if TYPE_CHECKING:
    from tests.gluon.ptx.decode import Instruction, Kernel

LONGEST_TURN = 300
"""Instructions that a warp executes at most before another one may."""


@dataclass(frozen=True)
class Schedule:
    """Who runs when.

    Attributes:
        seed: of the order of warps, the length of their turns, and when copies land.
        resident: programs that run at the same time.
        order: coordinates of all programs in the order of their start; None shuffles them.
    """

    seed: int = 0
    resident: int = 3
    order: Sequence[tuple[int, int, int]] | None = None


class Warp:
    """Thirty-two lanes: registers, and where in the code they are.

    Lanes that have gone different ways wait in ``_others`` by place; those furthest behind run
    first, so that ways meet again where they can.
    """

    def __init__(self, number: int, registers: list[Lanes], memory: Memory, shared: Shared,
                 barriers: Barriers) -> None:  # fmt: skip
        self.number, self.registers = number, registers
        self.memory, self.shared, self.barriers = memory, shared, barriers
        self.groups = Groups(shared, number)
        self.place = 0
        self.lanes: Mask = None
        self._others: list[tuple[int, Lanes]] = []

    def put(self, slot: int, value: Lanes, mask: Mask) -> None:
        """Write a register in some lanes."""
        if mask is not None:
            value = np.where(mask, value, self.registers[slot])
        self.registers[slot] = value

    def put_lanes(self, slot: int, lanes: Lanes, values: Lanes) -> None:
        """Write a register in numbered lanes."""
        if lanes.size == WARP:
            self.registers[slot] = values.astype(self.registers[slot].dtype, copy=False)
        else:
            changed = self.registers[slot].copy()
            changed[lanes] = values
            self.registers[slot] = changed

    def jump(self, target: int, mask: Mask) -> None:
        """Send lanes elsewhere; the others go on."""
        if mask is not None:
            here = np.ones(WARP, bool) if self.lanes is None else self.lanes
            left = here & ~mask
            if left.any():
                self._others.append((self.place, left))
            self.lanes = mask
        self.place = target
        self._gather()

    def run(self, code: Sequence[Instruction], turn: int) -> Signal | None:
        """Execute some instructions."""
        for _ in range(turn):
            if self._others and self.place >= self._others[0][0]:
                self._gather()
            instruction = code[self.place]
            self.place += 1
            try:
                signal = self._execute(instruction)
            except PtxError as error:
                where = f"warp {self.number}, statement {self.place - 1}"
                raise type(error)(f"{error}\n  {where}: {instruction.text}") from None
            if signal is not None:
                return signal
        return None

    def _execute(self, instruction: Instruction) -> Signal | None:
        mask = self.lanes
        if instruction.guard >= 0:
            chosen = self.registers[instruction.guard]
            chosen = ~chosen if instruction.negated else chosen
            chosen = chosen if mask is None else chosen & mask
            count = np.count_nonzero(chosen)
            if count == 0:
                return None
            mask = None if count == WARP else chosen
        if instruction.whole and mask is not None:
            raise Divergence(f"only {np.count_nonzero(mask)} lanes arrive")
        return instruction.run(self, mask)

    def _gather(self) -> None:
        """Run the lanes that are furthest behind, all of them."""
        if not self._others:
            return
        here = np.ones(WARP, bool) if self.lanes is None else self.lanes
        groups = [*self._others, (self.place, here)]
        self.place = min(place for place, _ in groups)
        lanes = np.any([lanes for place, lanes in groups if place == self.place], axis=0)
        self._others = sorted((g for g in groups if g[0] != self.place), key=lambda g: g[0])
        self.lanes = None if lanes.all() else lanes


class Program:
    """A block of warps with shared memory."""

    def __init__(self, kernel: Kernel, registers: list[Lanes], memory: Memory, warps: int,
                 shared_bytes: int, place: tuple[int, int, int], grid: tuple[int, int, int],
                 chance: random.Random) -> None:  # fmt: skip
        self.place = place
        self._shared = Shared(shared_bytes, warps)
        self._barriers = Barriers(self._shared, chance)
        self._waiting: set[int] = set()
        self.warps: dict[int, Warp] = {}
        for n in range(warps):
            mine = list(registers)
            lane = np.arange(WARP, dtype=np.uint32)
            values = {"%tid.x": lane + np.uint32(WARP * n), "%laneid": lane}
            for axis, at, size in zip("xyz", place, grid, strict=True):
                values[f"%ctaid.{axis}"] = np.full(WARP, at, np.uint32)
                values[f"%nctaid.{axis}"] = np.full(WARP, size, np.uint32)
            for name, slot in kernel.slots.special.items():
                mine[slot] = values[name]
            self.warps[n] = Warp(n, mine, memory, self._shared, self._barriers)

    @property
    def ready(self) -> list[int]:
        """Warps that can run."""
        return [n for n in self.warps if n not in self._waiting]

    def run(self, number: int, code: Sequence[Instruction], turn: int) -> None:
        """Let one warp run."""
        try:
            signal = self.warps[number].run(code, turn)
        except PtxError as error:
            raise type(error)(f"{error}\n  program {self.place}") from None
        if signal is Signal.EXIT:
            self.warps[number].groups.check_end()
            del self.warps[number]
        elif signal is Signal.BARRIER:
            self._waiting.add(number)
        if self._waiting and self._waiting >= self.warps.keys():
            self._waiting.clear()
            self._shared.barrier()
        if not self.warps:
            self._barriers.check_end()


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    warps: int,
    shared_bytes: int,
    arguments: Sequence[int | float],
    memory: Memory,
    schedule: Schedule | None = None,
) -> None:
    """Run a kernel to its end.

    Args:
        kernel: decoded.
        grid: programs along x, y and z.
        warps: of a program.
        shared_bytes: of a program.
        arguments: addresses and numbers; missing ones at the end are 0.
        memory: what addresses mean.
        schedule: order of execution.

    Raises:
        PtxError: something is wrong with the kernel.
    """
    schedule = schedule or Schedule()
    chance = random.Random(schedule.seed)
    places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    if schedule.order is not None:
        assert sorted(schedule.order) == sorted(places), "an order of other programs"
        places = list(schedule.order)
    else:
        chance.shuffle(places)
    registers = _registers(kernel, arguments)
    live: list[Program] = []
    with np.errstate(all="ignore"):
        while places or live:
            while places and len(live) < schedule.resident:
                place = places.pop(0)
                live.append(
                    Program(kernel, registers, memory, warps, shared_bytes, place, grid, chance)
                )
            program = chance.choice(live)
            number = chance.choice(program.ready)
            program.run(number, kernel.code, chance.randrange(1, LONGEST_TURN))
            if not program.warps:
                live.remove(program)


def _registers(kernel: Kernel, arguments: Sequence[int | float]) -> list[Lanes]:
    """What every warp starts with: constants, arguments, and undefined registers."""
    registers = list(kernel.slots.initial)
    values = [*arguments, *[0] * (len(kernel.parameters) - len(arguments))]
    for (slot, type_name), value in zip(kernel.parameters, values, strict=True):
        if isinstance(value, float):
            assert type_name.endswith("32"), f"a float for a parameter of type {type_name}"
            value = int.from_bytes(struct.pack("<f", value), "little")
        kind = "long" if type_name.endswith("64") else "word"
        bits = np.array(value % 2 ** (64 if kind == "long" else 32), np.uint64)
        registers[slot] = np.full(WARP, bits.astype(TYPES[kind]))
    return registers
