"""From statements to instructions: closures over slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.gluon.ptx import access
from tests.gluon.ptx.access import Mask, Run, Signal
from tests.gluon.ptx.errors import UnknownInstruction
from tests.gluon.ptx.floats import FLOATS
from tests.gluon.ptx.integers import INTEGERS, Pure
from tests.gluon.ptx.lanes import LANES, Warpwide
from tests.gluon.ptx.machine import Warp
from tests.gluon.ptx.operands import Operands, Slots, kind_of, listed
from tests.gluon.ptx.text import Statement, parse

PURE = INTEGERS | FLOATS
MEMORY = {
    "ld": access.load, "st": access.store, "atom": access.atomic, "red": access.atomic,
    "ldmatrix": access.matrix_access, "stmatrix": access.matrix_access,
    "mbarrier": access.mbarrier, "cp": access.copy, "bar": access.barrier,
    "fence": access.fence, "elect": access.elect,
}  # fmt: skip
WHOLE_WARP = ("ldmatrix", "stmatrix", "bar", "elect")
"""Besides those of :mod:`.lanes`: instructions that all lanes must execute together."""


@dataclass(frozen=True)
class Instruction:
    """What a warp does: ``run`` for the lanes whose ``guard`` (a slot, or -1) is not ``negated``.

    ``whole`` where all lanes must take part.
    """

    run: Run
    guard: int
    negated: bool
    whole: bool
    text: str


@dataclass(frozen=True)
class Kernel:
    """A decoded entry; ``parameters`` are slots and types of the arguments in order."""

    name: str
    code: tuple[Instruction, ...]
    slots: Slots
    parameters: tuple[tuple[int, str], ...]


def decode(ptx: str, name: str) -> Kernel:
    """The kernel ``name`` of a module, ready to run."""
    entry, slots = parse(ptx, name), Slots()
    parameters = tuple(
        (slots.parameter(n, kind_of(type_name)), type_name) for n, type_name in entry.parameters
    )
    code = tuple(_instruction(statement, slots) for statement in entry.statements)
    return Kernel(name, code, slots, parameters)


def _instruction(statement: Statement, slots: Slots) -> Instruction:
    try:
        guard = -1
        if statement.guard:
            guard = slots.source(statement.scope, statement.guard[0], "pred")
        negated = bool(statement.guard and statement.guard[1])
        operands = Operands(slots, statement.scope, statement.operands)
        run, whole = _run(statement.opcode, operands)
    except UnknownInstruction as error:
        raise UnknownInstruction(f"{error}\n  in: {statement}") from None
    return Instruction(run, guard, negated, whole, str(statement))


def _run(opcode: str, x: Operands) -> tuple[Run, bool]:
    """What an opcode does, and whether all lanes must take part."""
    first = opcode.split(".")[0]
    if opcode in LANES:
        return _warpwide(LANES[opcode], x), True
    if opcode in PURE:
        return _pure(PURE[opcode], x), False
    if opcode.startswith(("cvt.s8.", "cvt.u8.")):
        return _narrow(opcode, x), False
    if first == "mov":
        return _move(opcode, x), False
    if opcode.startswith("ld.param."):
        return _copy(x.target(0), x.slots.parameter(x.texts[1].strip("[] "), "")), False
    if first in ("selp", "setp"):
        return (_select if first == "selp" else _compare_and_combine)(opcode, x), False
    if first in MEMORY:
        return MEMORY[first](opcode, x), first in WHOLE_WARP or opcode.endswith("_group")
    if first == "bra":
        target = x.scope.label(x.texts[0])
        return lambda warp, mask: warp.jump(target, mask), False
    if opcode == "ret":
        return lambda _warp, _mask: Signal.EXIT, True
    raise UnknownInstruction(f"opcode {opcode} is in no table")


def _pure(pure: Pure, x: Operands) -> Run:
    """A target and as many sources as the table says."""
    target, function = x.target(0), pure.function
    if len(x.texts) != 1 + len(pure.kinds):
        raise UnknownInstruction(f"{len(x.texts)} operands where {1 + len(pure.kinds)} are known")
    sources = [x.source(1 + i, kind) for i, kind in enumerate(pure.kinds)]
    if len(sources) == 2:
        first, second = sources

        def binary(warp: Warp, mask: Mask) -> None:
            r = warp.registers
            warp.put(target, function(r[first], r[second]), mask)

        return binary

    def run(warp: Warp, mask: Mask) -> None:
        r = warp.registers
        warp.put(target, function(*[r[s] for s in sources]), mask)

    return run


def _warpwide(entry: Warpwide, x: Operands) -> Run:
    targets, function = x.targets(0), entry.function
    sources = [s for i, kind in enumerate(entry.kinds) for s in x.sources(1 + i, kind)]

    def run(warp: Warp, mask: Mask) -> None:
        results = function(*[warp.registers[s] for s in sources])
        for target, value in zip(targets, results, strict=True):
            warp.put(target, value, mask)

    return run


def _narrow(opcode: str, x: Operands) -> Run:
    """``cvt`` to 8 bits, which fill the wider target with their sign or with zeros."""
    target, source = x.target(0), x.source(1, kind_of(opcode.split(".")[2]))
    narrow = {"s8": np.int8, "u8": np.uint8}[opcode.split(".")[1]]
    dtype = x.slots.initial[target].dtype

    def run(warp: Warp, mask: Mask) -> None:
        warp.put(target, warp.registers[source].astype(narrow).astype(dtype), mask)

    return run


def _copy(target: int, source: int) -> Run:
    def run(warp: Warp, mask: Mask) -> None:
        warp.put(target, warp.registers[source], mask)

    return run


def _move(opcode: str, x: Operands) -> Run:
    """``mov``, also between a register and its halves."""
    kind = kind_of(opcode.split(".")[1])
    into, out_of = (x.texts[i].startswith("{") for i in range(2))
    part = {"word": "half", "long": "word"}.get(kind, "")
    if not into and not out_of:
        return _copy(x.target(0), x.source(1, kind))
    if into == out_of or not part or len(listed(x.texts[0 if into else 1])) != 2:
        raise UnknownInstruction(opcode)
    dtype = {"half": np.uint16, "word": np.uint32}[part]
    whole = {"word": np.uint32, "long": np.uint64}[kind]
    if into:
        low, high = x.targets(0)
        source = x.source(1, kind)

        def split(warp: Warp, mask: Mask) -> None:
            parts = np.ascontiguousarray(warp.registers[source]).view(dtype).reshape(-1, 2)
            warp.put(low, parts[:, 0].copy(), mask)
            warp.put(high, parts[:, 1].copy(), mask)

        return split
    target = x.target(0)
    first, second = x.sources(1, part)

    def join(warp: Warp, mask: Mask) -> None:
        both = np.stack([warp.registers[first], warp.registers[second]], 1)
        warp.put(target, both.view(whole)[:, 0], mask)

    return join


def _select(opcode: str, x: Operands) -> Run:
    kind = kind_of(opcode.split(".")[1])
    target, chooser = x.target(0), x.source(3, "pred")
    first, second = x.source(1, kind), x.source(2, kind)

    def run(warp: Warp, mask: Mask) -> None:
        r = warp.registers
        warp.put(target, np.where(r[chooser], r[first], r[second]), mask)

    return run


def _compare_and_combine(opcode: str, x: Operands) -> Run:
    """``setp.compare.{and,or}.type p, a, b, {!}c``."""
    _, compare, combine, type_name = [*opcode.split("."), ""][:4]
    pure = PURE.get(f"setp.{compare}.{type_name}")
    if pure is None or combine not in ("and", "or") or len(x.texts) != 4:
        raise UnknownInstruction(f"opcode {opcode} is in no table")
    target, function = x.target(0), pure.function
    first, second = (x.source(1 + i, kind) for i, kind in enumerate(pure.kinds))
    negated = x.texts[3].startswith("!")
    other = x.slots.source(x.scope, x.texts[3].lstrip("!"), "pred")
    merge = np.logical_and if combine == "and" else np.logical_or

    def run(warp: Warp, mask: Mask) -> None:
        r = warp.registers
        condition = ~r[other] if negated else r[other]
        warp.put(target, merge(function(r[first], r[second]), condition), mask)

    return run
