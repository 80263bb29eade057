"""Registers and constants of a kernel as numbered slots of one list."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tests.gluon.ptx.errors import UnknownInstruction
from tests.gluon.ptx.text import KINDS, Scope

Lanes: TypeAlias = NDArray[Any]
"""Values of a register in the 32 lanes of a warp."""

WARP = 32
SHARED_BASE = 1024
"""Where a kernel's dynamic shared memory begins: Hopper keeps the first KiB for itself."""

TYPES = {"pred": np.bool_, "half": np.uint16, "word": np.uint32, "long": np.uint64}

_SPECIAL = {"%tid.x", "%laneid"} | {f"%{what}.{d}" for what in ("ctaid", "nctaid") for d in "xyz"}
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


def undefined(kind: str) -> Lanes:
    """What a register holds before anything is written: NaN as a float, far away as an address."""
    bits = {"pred": 1, "half": 0xFFF7, "word": 0xFFF7FFF7, "long": 0xFFF7FFF7FFF7FFF7}[kind]
    return np.full(WARP, bits, TYPES[kind])


@dataclass
class Slots:
    """What a warp starts with: one array a slot, and which slots hold special registers."""

    initial: list[Lanes] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def register(self, scope: Scope, name: str) -> int | None:
        """A declared register's slot; None for any other name."""
        home = scope.declaring(name)
        if home is None:
            return None
        kind = home.registers[name]
        return self._slot((id(home), name), undefined(kind))

    def source(self, scope: Scope, text: str, kind: str) -> int:
        """The slot of something read: a register, a special one, a symbol or a number."""
        slot = self.register(scope, text)
        if slot is not None:
            return slot
        if text in _SPECIAL:
            self.special[text] = self._slot((text,), undefined("word"))
            return self.special[text]
        number = np.array(_number(text) % 2**64, np.uint64).astype(TYPES[kind])
        return self._slot((text, kind), np.full(WARP, number))

    def target(self, scope: Scope, text: str) -> int:
        """The slot of something written; ``_`` is written and never read."""
        slot = self._slot(("_",), undefined("word")) if text == "_" else None
        slot = self.register(scope, text) if slot is None else slot
        if slot is None:
            raise UnknownInstruction(f"{text} is no register in scope")
        return slot

    def parameter(self, name: str, kind: str) -> int:
        """The slot of a kernel's argument; ``kind`` is given where it is declared."""
        if not kind and ("param", name) not in self._known:
            raise UnknownInstruction(f"no parameter {name}")
        return self._slot(("param", name), undefined(kind or "word"))

    def _slot(self, key: tuple[Any, ...], start: Lanes) -> int:
        if key not in self._known:
            self._known[key] = len(self.initial)
            self.initial.append(start)
        return self._known[key]


@dataclass(frozen=True)
class Operands:
    """The operands of one statement, by place."""

    slots: Slots
    scope: Scope
    texts: tuple[str, ...]

    def source(self, place: int, kind: str) -> int:
        """A slot to read."""
        return self.slots.source(self.scope, self.texts[place], kind)

    def target(self, place: int) -> int:
        """A slot to write."""
        return self.slots.target(self.scope, self.texts[place])

    def sources(self, place: int, kind: str) -> list[int]:
        """Slots of a vector, or of the one register."""
        return [self.slots.source(self.scope, x, kind) for x in listed(self.texts[place])]

    def targets(self, place: int) -> list[int]:
        """Slots of a vector to write, or of the one register."""
        return [self.slots.target(self.scope, x) for x in listed(self.texts[place])]

    def address(self, place: int, kind: str) -> tuple[int, int]:
        """Slot and offset of ``[base + offset]``."""
        found = _ADDRESS.fullmatch(self.texts[place])
        if not found:
            raise UnknownInstruction(f"address {self.texts[place]}")
        return self.slots.source(self.scope, found[1], kind), int(found[2] or "0", 0)


def listed(text: str) -> list[str]:
    """Members of ``{a, b}``, or the operand itself."""
    return [x.strip() for x in text.strip("{} \n").split(",")]


def kind_of(type_name: str) -> str:
    """Register kind of an opcode's type."""
    if type_name not in KINDS:
        raise UnknownInstruction(f"type {type_name}")
    return KINDS[type_name]


def _number(text: str) -> int:
    if text == "global_smem":
        return SHARED_BASE
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        raise UnknownInstruction(f"operand {text}") from None
