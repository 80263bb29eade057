"""Instructions that touch memory, barriers or control: each has a function that decodes it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tests.gluon.ptx.copies import LaneCopy
from tests.gluon.ptx.errors import UnknownInstruction
from tests.gluon.ptx.lanes import fragment_rows, rows_fragment
from tests.gluon.ptx.memory import Combine
from tests.gluon.ptx.operands import WARP, Lanes, Operands, kind_of

if TYPE_CHECKING:
    from tests.gluon.ptx.machine import Warp


class Signal(Enum):
    """Why a warp stops for now."""

    BARRIER = auto()
    WAIT = auto()
    EXIT = auto()


Mask: TypeAlias = Lanes | None
"""Lanes that execute an instruction; None for all of them."""

Run: TypeAlias = "Callable[[Warp, Mask], Signal | None]"

ALL = np.arange(WARP)
_CACHING = {"cg", "ca", "cs", "volatile", "relaxed", "acq_rel", "gpu", "cta"}
"""Parts of opcodes that say how, not what: here all memory is coherent."""


def active(mask: Mask) -> Lanes:
    """Numbers of the lanes of a mask."""
    return ALL if mask is None else np.flatnonzero(mask)


def _addresses(warp: Warp, base: int, offset: int, lanes: Lanes) -> Lanes:
    return warp.registers[base][lanes].astype(np.int64) + offset


def _parts(opcode: str) -> list[str]:
    """Parts of an opcode without caching, with the state space's extent dropped."""
    parts = opcode.replace("::cta", "").split(".")
    return [x for x in parts if x not in _CACHING]


def load(opcode: str, x: Operands) -> Run:
    """``ld.{global,shared}{.v2,.v4}.type``."""
    space, kind, count = _access(opcode)
    targets = x.targets(0)
    base, offset = x.address(1, "long" if space == "global" else "word")
    if len(targets) != count:
        raise UnknownInstruction(f"{opcode} with {len(targets)} registers")

    def run(warp: Warp, mask: Mask) -> None:
        lanes = active(mask)
        at = _addresses(warp, base, offset, lanes)
        if space == "global":
            values = warp.memory.load(at, kind, count)
        else:
            values = warp.shared.load(warp.number, lanes, at, kind, count)
        for target, value in zip(targets, values, strict=True):
            warp.put_lanes(target, lanes, value)

    return run


def store(opcode: str, x: Operands) -> Run:
    """``st.{global,shared}{.v2,.v4}.type``."""
    space, kind, count = _access(opcode)
    base, offset = x.address(0, "long" if space == "global" else "word")
    sources = x.sources(1, "word" if kind == "byte" else kind)
    if len(sources) != count:
        raise UnknownInstruction(f"{opcode} with {len(sources)} registers")

    def run(warp: Warp, mask: Mask) -> None:
        lanes = active(mask)
        at = _addresses(warp, base, offset, lanes)
        values = [warp.registers[s][lanes] for s in sources]
        if space == "global":
            warp.memory.store(at, kind, values)
        else:
            warp.shared.store(warp.number, lanes, at, kind, values)

    return run


def _access(opcode: str) -> tuple[str, str, int]:
    """State space, kind of a value, and how many."""
    parts = _parts(opcode)
    count = int(parts.pop(2)[1:]) if parts[2] in ("v2", "v4") else 1
    if len(parts) != 3 or parts[1] not in ("global", "shared"):
        raise UnknownInstruction(opcode)
    kind = "byte" if parts[2] in ("u8", "b8") else kind_of(parts[2])
    return parts[1], kind, count


_ATOMICS: dict[tuple[str, ...], Combine] = {
    ("add", "u32"): operator.add, ("add", "s32"): operator.add, ("xor", "b32"): operator.xor,
}  # fmt: skip


def atomic(opcode: str, x: Operands) -> Run:
    """``atom`` and ``red``: words are changed in the order of lanes."""
    parts = _parts(opcode)
    combine = _ATOMICS.get(tuple(parts[2:]))
    if combine is None or parts[1] not in ("global", "shared"):
        raise UnknownInstruction(opcode)
    place = 1 if parts[0] == "atom" else 0
    target = x.target(0) if place else None
    base, offset = x.address(place, "long" if parts[1] == "global" else "word")
    source = x.source(place + 1, "word")

    def run(warp: Warp, mask: Mask) -> None:
        lanes = active(mask)
        at, values = _addresses(warp, base, offset, lanes), warp.registers[source][lanes]
        if parts[1] == "global":
            before = warp.memory.combine(at, values, combine)
        else:
            before = warp.shared.combine(warp.number, lanes, at, values, combine)
        if target is not None:
            warp.put_lanes(target, lanes, before)

    return run


def matrix_access(opcode: str, x: Operands) -> Run:
    """``ldmatrix`` and ``stmatrix`` of one 8x8 matrix, rows at the addresses of lanes 0 to 7."""
    parts = _parts(opcode)
    if parts[1:] != ["sync", "aligned", "m8n8", "x1", "shared", "b16"]:
        raise UnknownInstruction(opcode)
    loads = parts[0] == "ldmatrix"
    base, offset = x.address(1 if loads else 0, "word")
    register = x.targets(0)[0] if loads else x.sources(1, "word")[0]
    rows = ALL[:8]

    def run(warp: Warp, _mask: Mask) -> None:
        at = _addresses(warp, base, offset, rows)
        words = [at + 4 * k for k in range(4)]
        if loads:
            found = [warp.shared.load(warp.number, 4 * rows + k, words[k], "word", 1)[0]
                     for k in range(4)]  # fmt: skip
            warp.put(register, rows_fragment(np.stack(found, 1).view(np.uint16)), None)
            return
        matrix = fragment_rows(warp.registers[register]).view(np.uint32)
        for k in range(4):
            column = np.ascontiguousarray(matrix[:, k])
            warp.shared.store(warp.number, 4 * rows + k, words[k], "word", [column])

    return run


def mbarrier(opcode: str, x: Operands) -> Run:
    """``mbarrier.init``, ``.arrive.expect_tx`` and ``.try_wait.parity`` in shared memory."""
    action = _parts(opcode)[1:]
    if action == ["init", "shared", "b64"]:
        (base, offset), count = x.address(0, "word"), x.source(1, "word")

        def create(warp: Warp, mask: Mask) -> None:
            for lane, at in _each(warp, base, offset, mask):
                warp.barriers.create(at, int(warp.registers[count][lane]))

        return create
    if action == ["arrive", "expect_tx", "shared", "b64"] and x.texts[0] == "_":
        (base, offset), announced = x.address(1, "word"), x.source(2, "word")

        def arrive(warp: Warp, mask: Mask) -> None:
            for lane, at in _each(warp, base, offset, mask):
                warp.barriers.arrive(at, int(warp.registers[announced][lane]))

        return arrive
    if action == ["try_wait", "parity", "shared", "b64"]:
        return _wait(x)
    raise UnknownInstruction(opcode)


def _wait(x: Operands) -> Run:
    target, (base, offset), parity = x.target(0), x.address(1, "word"), x.source(2, "word")

    def wait(warp: Warp, mask: Mask) -> Signal | None:
        done = np.zeros(WARP, bool)
        asked: dict[tuple[int, int], bool] = {}
        for lane, at in _each(warp, base, offset, mask):
            question = (at, int(warp.registers[parity][lane]))
            if question not in asked:  # once for all lanes, or copies would land at once
                asked[question] = warp.barriers.poll(*question, warp.number)
            done[lane] = asked[question]
        warp.put(target, done, mask)
        return None if done[active(mask)].all() else Signal.WAIT

    return wait


def bulk_copy(opcode: str, x: Operands) -> Run:
    """``cp.async.bulk`` from global to shared memory."""
    wanted = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    if opcode != wanted:
        raise UnknownInstruction(opcode)
    to, source, size = x.address(0, "word"), x.address(1, "long"), x.source(2, "word")
    base, offset = x.address(3, "word")

    def run(warp: Warp, mask: Mask) -> None:
        for lane, barrier in _each(warp, base, offset, mask):
            count = int(warp.registers[size][lane])
            start = int(warp.registers[source[0]][lane]) + source[1]
            data = warp.memory.view(start, count).copy()
            if start % 16:
                raise UnknownInstruction(f"a bulk copy from {start:#x}, not a multiple of 16")
            span = warp.shared.begin_copy(
                warp.number, int(warp.registers[to[0]][lane]) + to[1], count
            )
            warp.barriers.copy(barrier, span, data)

    return run


def copy(opcode: str, x: Operands) -> Run:
    """``cp.async``: bulk, or sixteen bytes a lane and its groups."""
    if opcode == "cp.async.commit_group":
        return lambda warp, _mask: warp.groups.commit()
    if opcode == "cp.async.wait_group":
        pending = int(x.texts[0])
        return lambda warp, _mask: warp.groups.wait(pending)
    if opcode != "cp.async.cg.shared.global":
        return bulk_copy(opcode, x)
    (to, to_offset), (source, offset) = x.address(0, "word"), x.address(1, "long")
    if x.texts[2] != "16":
        raise UnknownInstruction(f"{opcode} of {x.texts[2]} bytes")

    def run(warp: Warp, mask: Mask) -> None:
        lanes = active(mask)
        words = warp.memory.load(_addresses(warp, source, offset, lanes), "word", 4)
        warp.groups.copy(LaneCopy(lanes, _addresses(warp, to, to_offset, lanes), words))

    return run


def _each(warp: Warp, base: int, offset: int, mask: Mask) -> list[tuple[int, int]]:
    """(lane, address) of every active lane."""
    return [(int(n), int(warp.registers[base][n]) + offset) for n in active(mask)]


def barrier(opcode: str, _x: Operands) -> Run:
    """``bar.sync`` of the program and ``bar.warp.sync`` of the warp."""
    if opcode == "bar.sync":
        return lambda _warp, _mask: Signal.BARRIER
    if opcode == "bar.warp.sync":
        return lambda warp, _mask: warp.shared.warp_barrier(warp.number)
    raise UnknownInstruction(opcode)


def fence(_opcode: str, _x: Operands) -> Run:
    """Fences order what is in order here."""
    return lambda _warp, _mask: None


def elect(opcode: str, x: Operands) -> Run:
    """``elect.sync _|p``: the first lane."""
    if opcode != "elect.sync" or not x.texts[0].startswith("_|"):
        raise UnknownInstruction(opcode)
    target = x.slots.target(x.scope, x.texts[0][2:])
    return lambda warp, _mask: warp.put(target, ALL == 0, None)
