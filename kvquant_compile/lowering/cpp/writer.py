"""A writer of C++ functions, and the loads and bit operations that unpack selectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvquant_compile.codec.fragments import GROUP, vector_width
from kvquant_compile.lowering.triton.emit import Source

LANE_VECTOR = 16
"""Lanes of one vector: half of a page's 32."""


class CppSource(Source):
    """Lines of C++ at a current indentation."""

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Lines written inside are indented below ``head {`` and closed."""
        with super().block(head + " {"):
            yield
        self("}")


@dataclass(frozen=True)
class CodeWords:
    """How the code words of a page's keys or values lie, for sixteen lanes.

    Attributes:
        offset: first byte of the section in a page.
        bits: of a code.
        selectors: of a lane and a chunk.
    """

    offset: int
    bits: int
    selectors: int

    @property
    def sections(self) -> int:
        """2 where the chunks are stored one after the other, 1 where groups run across."""
        return 2 if self.selectors % GROUP == 0 else 1

    @property
    def _per_lane(self) -> int:
        """Words of a lane in one section."""
        return 2 * self.selectors // self.sections * self.bits // GROUP

    def read(self, out: CppSource, chunk: int, *, name: str = "s", which: str = "chunk") -> None:
        """Declare and fill ``s0 ..`` (and ``h0 ..``, the high bits of codes above four): the
        selectors of a chunk for the sixteen lanes that start at ``half``.

        Args:
            out: to write to.
            chunk: where groups run across chunks; any else.
            name: prefix of the selectors.
            which: C++ expression of the chunk, where chunks lie apart.
        """
        first = chunk * self.selectors if self.sections == 1 else 0
        used = range(first // GROUP, -(-(first + self.selectors) // GROUP))
        self._load(out, which, used, name)
        for group in used:
            self._unpack(out, group, first, name)

    def _load(self, out: CppSource, which: str, groups: range, name: str) -> None:
        width = vector_width(self._per_lane)
        section = 0 if self.sections == 1 else 128 * self._per_lane
        at = f"page + {self.offset} + {which} * {section}" if section else f"page + {self.offset}"
        out(f"const uint8_t* {name}_at = {at} + half * {4 * width * LANE_VECTOR};")
        needed = {group * self.bits + i for group in groups for i in range(self.bits)}
        for vector in sorted({word // width for word in needed}):
            words = [f"{name}w{vector * width + i}" for i in range(width)]
            out(f"vu {', '.join(words)};")
            out(f"load_words{width}({name}_at + {vector * 128 * width}, {', '.join(words)});")

    def _unpack(self, out: CppSource, group: int, first: int, name: str) -> None:
        words = [f"{name}w{group * self.bits + i}" for i in range(self.bits)]
        for j, text in enumerate(_selectors(words[:4], min(self.bits, 4))):
            self._declare(out, name, group * GROUP + j - first, text)
        if self.bits > 4:
            for j, text in enumerate(_selectors(words[4:], self.bits - 4)):
                self._declare(out, "h", group * GROUP + j - first, text)

    def _declare(self, out: CppSource, kind: str, index: int, text: str) -> None:
        if 0 <= index < self.selectors:
            out(f"vu {kind}{index} = {text};")

    def levels(self, selectors: list[int], table: str) -> str:
        """A C++ function (which of the selectors, nibble) -> levels."""
        low = _pick("s", selectors)
        if self.bits <= 4:
            return f"[&](int i, int nibble) {{ return lookup({table}, {low} >> (4 * nibble)); }}"
        high = _pick("h", selectors)
        mask = (1 << self.bits - 4) - 1
        return (
            f"[&](int i, int nibble) {{ return gather({table}, (vi)(({low} >> (4 * nibble) & 15u)"
            f" | ({high} >> (4 * nibble) & {mask}u) << 4)); }}"
        )


def _pick(kind: str, selectors: list[int]) -> str:
    names = [f"{kind}{i}" for i in selectors]
    return names[0] if len(names) == 1 else f"(i ? {names[1]} : {names[0]})"


def _selectors(words: list[str], bits: int) -> list[str]:
    """Four selectors of a group, as expressions; bits of a nibble above the code are free.

    Inverse of the packing in :mod:`kvquant_compile.codec.fragments`.
    """
    if bits == 4:
        return words
    if bits == 3:
        a, b, c = words
        ones = [f"{bit}u" for bit in ("0x11111111", "0x22222222", "0x44444444")]
        parts = zip(words, (3, 2, 1), ones, strict=True)
        return [a, b, c, " | ".join(f"({w} >> {s} & {mask})" for w, s, mask in parts)]
    if bits == 2:
        return [x for w in words for x in (w, f"{w} >> 2")]
    return [words[0], *(f"{words[0]} >> {shift}" for shift in (1, 2, 3))]
