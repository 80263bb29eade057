"""A little writer of indented source, and the loads and bit operations that unpack selectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvquant_compile.codec.fragments import GROUP

ONCE = ', cache_modifier=".cg"'
"""For what is read once: tables that all pages read stay in the first cache."""


class Source:
    """Lines of Python at a current indentation."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def __call__(self, *lines: str) -> None:
        """Append lines at the current depth."""
        for line in lines:
            self._lines.append("    " * self._depth + line if line else "")

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Lines written inside are indented below ``head``."""
        self(head)
        self._depth += 1
        yield
        self._depth -= 1

    def text(self) -> str:
        """The source so far."""
        return "\n".join(self._lines) + "\n"


@dataclass(frozen=True)
class CodeWords:
    """How the code words of a page's keys or values lie, for one lane.

    Attributes:
        prefix: of the variables that hold them.
        offset: first byte of the section in a page.
        bits: of a code.
        selectors: of a lane and a chunk.
    """

    prefix: str
    offset: int
    bits: int
    selectors: int

    @property
    def sections(self) -> int:
        """2 where the chunks are stored one after the other, 1 where groups run across."""
        return 2 if self.selectors % GROUP == 0 else 1

    @property
    def per_lane(self) -> int:
        """Words of a lane in one section."""
        return 2 * self.selectors // self.sections * self.bits // GROUP

    @property
    def width(self) -> int:
        """Words of one load."""
        return next(width for width in (4, 2, 1) if self.per_lane % width == 0)

    def vectors(self) -> list[tuple[str, int, bool]]:
        """(variable, first word of the page, whether per chunk) of every load."""
        out = []
        apart = self.sections == 2  # then one load fetches the same words of both chunks
        for j in range(self.per_lane // self.width):
            out.append((f"{self.prefix}v{j}", self.offset // 4 + 32 * j * self.width, apart))
        return out

    def load(self, out: Source, base: str) -> None:
        """Loads of all words of the page whose word pointers are ``base`` [W]."""
        for name, first, apart in self.vectors():
            if apart and self.width == 4:
                step = f"{32 * self.per_lane} * two[:, None, None]"
                pointers = f"{base}[None, :, None] + {first} + {step} + flat{self.width}"
                out(f"{name} = {load_rows(pointers, 32 * self.width, ONCE)}")
                continue
            # A narrower load of both chunks would be widened, and lanes get others' words.
            for chunk in range(2 if apart else 1):
                at = f"{first + chunk * 32 * self.per_lane} + flat{self.width}[None, :]"
                tail = f"_{chunk}" if apart else ""
                out(f"{name}{tail} = tl.load({base}[:, None] + {at}{ONCE})")

    def split(self, out: Source) -> None:
        """Vectors into one variable a word: [W, 32, 2] (chunk last) or [W, 32]."""
        for j in range(self.per_lane // self.width):
            words = [self._word(j * self.width + i) for i in range(self.width)]
            vector, lead = f"{self.prefix}v{j}", "[W, 32]"
            if self.sections == 2:
                both = f"{vector}_0, {vector}_1" if self.width < 4 else vector
                name = "joined_chunks" if self.width < 4 else "per_chunk"
                vector, lead = f"{name}({both}, W, {self.width})", "[W, 32, 2]"
            value = {
                4: f"split4({vector}, {lead})",
                2: f"{vector}.reshape({lead} + [2]).split()",
                1: f"{vector}.reshape({lead})",
            }
            out(f"{', '.join(words)} = {value[self.width]}")

    def unpack(self, out: Source) -> None:
        """All selectors, four at a time."""
        for group in range(self.per_lane // self.bits):
            words = [self._word(group * self.bits + i) for i in range(self.bits)]
            names = [self._name(group * GROUP + i) for i in range(GROUP)]
            _unpack(out, names, words[:4], min(self.bits, 4))
            if self.bits > 4:
                _unpack(out, [f"{n}h" for n in names], words[4:], self.bits - 4)

    def tiles(self, first: int, second: int) -> tuple[str, str]:
        """Low and high nibbles [W, 32, 4] of a selector of tile 0 and one of tile 1, both
        chunks, as expressions."""
        tails = ["", "h"] if self.bits > 4 else [""]
        found = [self._joined(first, second, tail) for tail in tails]
        return found[0], found[-1]

    def _joined(self, first: int, second: int, tail: str) -> str:
        if self.sections == 2:
            return f"joined2({self._name(first)}{tail}, {self._name(second)}{tail}, W)"
        names = [
            self._name(chunk * self.selectors + index) + tail
            for chunk in range(2)
            for index in (first, second)
        ]
        return f"joined4({', '.join(names)}, W)"

    def _word(self, index: int) -> str:
        return f"{self.prefix}w{index}"

    def _name(self, index: int) -> str:
        return f"{self.prefix}s{index}"


def load_rows(pointers: str, width: int, options: str = "") -> str:
    """A load [n, W, width] of contiguous rows, one a warp, with more arguments if any.

    The hint only breaks a tie: Triton 3.6 would otherwise spread warps over the front. It is
    lost when a device function makes it.
    """
    return f"tl.load(tl.max_contiguous({pointers}, [1, 2, {width}]){options})"


def load_token_pairs(out: Source, name: str, base: str) -> None:
    """``name0`` .. ``name3`` [W, 8], something of each pair of neighbouring tokens of a page in the
    order of the rows of keys: so few at once that Triton loads them where they are needed, with no
    moves between lanes."""
    for n in range(4):
        out(f"{name}{n} = tl.load({base} + {16 * (n // 2) + n % 2} + 2 * eight[None, :])")


def _unpack(out: Source, names: list[str], words: list[str], bits: int) -> None:
    """Inverse of the packing in :mod:`kvquant_compile.codec.fragments`, four selectors at once."""
    if bits == 4:
        rows = words
    elif bits == 3:
        a, b, c = words
        rows = [f"{w} & 0x77777777" for w in words]
        rows.append(
            f"(({a} >> 3) & 0x11111111) | (({b} >> 2) & 0x22222222) | (({c} >> 1) & 0x44444444)"
        )
    elif bits == 2:
        rows = [f"({w} >> {s}) & 0x33333333" for w in words for s in (0, 2)]
    else:
        rows = [f"({words[0]} >> {s}) & 0x11111111" for s in range(4)]
    for name, row in zip(names, rows, strict=True):
        out(f"{name} = {row}")
