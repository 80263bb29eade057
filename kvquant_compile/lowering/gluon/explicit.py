"""Keys that are rotated token by token: fragments of bytes to fragments of turned keys.

A pair's bytes u, v enter as subnormal halves. How they become turned keys p, q depends on whether a
lane's two tokens of a tile, neighbours, have the rotation in common:

* They have where queries have a column to spare: the second token is one further than the first,
  and meets a query that is turned back by one. Scales and zeros are in the table then:
  ``p = u A cos - v B sin + C`` and ``q = u A sin + v B cos + D``, over a power of two of the pair,
  which is in the query. Three vectors a fragment: A cos, -B sin; A sin, B cos; C, D, of two words
  each. C and D make up for the rounding of the factors at the bytes that mean zero.
* Otherwise they are scaled and centred, by registers, and then turned: two vectors, cosines and
  sines of four words.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.gluon.fragments import load_shared, product
from kvquant_compile.lowering.gluon.memory import Constants, Memory
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.writer import KernelWriter, listed, registers


@dataclass(frozen=True)
class ExplicitEmitter:
    """Writes what the fragments of explicit groups are turned by, and how."""

    spec: GluonSpec
    memory: Memory

    def prologue(self, out: KernelWriter) -> None:
        """Scales and centres in registers, where tables do not contain them."""
        if self.spec.neighbours:
            return
        for pairs in range(self.spec.explicit):
            names = [f"z{pairs}_{i}" for i in range(8)]
            at = self.memory.constants + Constants(self.spec).scales + 192 * pairs
            load_shared(out, names, "shared + t * 16", at, at + 64)

    def load(self, out: KernelWriter, tile: int, pairs: int) -> list[str]:
        """Words for :meth:`text`, of a tile's group."""
        size = Constants(self.spec).rotation_bytes
        count = size // 512
        at = self.memory.constants + Constants(self.spec).rotation
        at += size * (tile * self.spec.explicit + pairs)
        names = [f"e{i}" for i in range(4 * count)]
        load_shared(out, names, "shared + lane * 16", *range(at, at + size, 512))
        return names if self.spec.neighbours else [*names, *(f"z{pairs}_{i}" for i in range(8))]

    @property
    def words(self) -> int:
        """How many :meth:`load` gives."""
        return 12 if self.spec.neighbours else 16

    def text(self, words: list[str]) -> str:
        """PTX: fragments ``a``, ``b`` of bytes to ``p``, ``q``. Word k is of row ``k % 2`` and half
        ``k // 2``."""
        both = _turn_neighbours if self.spec.neighbours else _turn
        return ".reg .b32 p<4>, q<4>;\n" + both(words)

    def zeros(self, out: KernelWriter, tile: int, pairs: int) -> None:
        """Add a group's products of turned zeros to ``turned_{0..3}``.

        Tokens that share rotations have rows alike: the rows of a product are two tiles' then.
        """
        number = tile
        if self.spec.neighbours:
            number, second = divmod(tile, 2)
            if second:
                return
        at = self.memory.constants + Constants(self.spec).zeros
        at += 1024 * (number * self.spec.explicit + pairs)
        a, b = [f"x{k}" for k in range(4)], [f"y{k}" for k in range(4)]
        text = ".reg .b32 x<4>, y<4>;\n"
        for i, words in enumerate((a, b)):
            text += f"ld.shared.v4.b32 {listed(words)}, [$4+{at + 512 * i}];\n"
        d, q = registers(0, 4), registers(5, 4)
        text += product(d, a, q[:2], registers(9, 4)) + product(d, b, q[2:], d)
        queries = [f"q0_{pairs}_{x}" for x in ("a0", "a1", "b0", "b1")]
        sums = [f"turned_{i}" for i in range(4)]
        inputs = ["shared + lane * 16", *queries, *(sums if pairs else ["zero"] * 4)]
        out.ptx(text, sums, inputs, kinds="rrrrrffff", into="ffff", name="KEY_ZEROS")

    def sum_of(self, r: int, group: int) -> str:
        """The sum of a tile's products that belongs to the lane's token r, for a group's query."""
        return f"plain_{3 * r if self.spec.neighbours else 2 * r + group}"

    def zero_of(self, tile: int, r: int, group: int) -> str:
        """The same of turned zeros; tiles are counted in their chunk."""
        return f"turned_{2 * tile + r if self.spec.neighbours else 2 * r + group}"


def _turn_neighbours(words: list[str]) -> str:
    text = ""
    for k in range(4):
        same_a, cross_b, cross_a, same_b, c, d = words[k // 2 :: 2]
        text += (
            f"fma.rn.f16x2 p{k}, b{k}, {cross_b}, {c}; fma.rn.f16x2 p{k}, a{k}, {same_a}, p{k};\n"
            f"fma.rn.f16x2 q{k}, a{k}, {cross_a}, {d}; fma.rn.f16x2 q{k}, b{k}, {same_b}, q{k};\n"
        )
    return text


def _turn(words: list[str]) -> str:
    """Words: cosines and sines of the four words; of either member, scales and centres by half."""
    turns, scales = words[:8], words[8:]
    text = ""
    for k in range(4):
        for member, first in (("a", 0), ("b", 4)):
            scale, centre = scales[first + k // 2], scales[first + 2 + k // 2]
            text += f"fma.rn.f16x2 {member}{k}, {member}{k}, {scale}, {centre};\n"
    for k in range(4):
        cos, sin = turns[k], turns[4 + k]
        text += (
            f"mul.rn.f16x2 p{k}, b{k}, {sin}; neg.f16x2 p{k}, p{k};"
            f" fma.rn.f16x2 p{k}, a{k}, {cos}, p{k};\n"
            f"mul.rn.f16x2 q{k}, a{k}, {sin}; fma.rn.f16x2 q{k}, b{k}, {cos}, q{k};\n"
        )
    return text
