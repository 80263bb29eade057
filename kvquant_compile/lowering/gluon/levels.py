"""Scales, centres and zeros of the pairs whose rotation is a series, on the queries' side.

A query word carries its channels' scales. What is left of a key then, besides its bytes, is the
same for all tokens of a page but for the token scale: a level for every column.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.gluon.fragments import load_shared, product, program_sync
from kvquant_compile.lowering.gluon.memory import Constants, Memory
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.writer import KernelWriter, registers

WORDS = ("a0", "a1", "b0", "b1")
"""A fragment's words: either member of the pairs, lower and upper half of its columns."""


@dataclass(frozen=True)
class LevelEmitter:
    """Writes what products of keys start from."""

    spec: GluonSpec
    memory: Memory

    def prologue(self, out: KernelWriter) -> None:
        """Scales into the queries that every page turns."""
        if not (self.spec.rotates and self.spec.series):
            return
        for pairs in self.spec.series:
            at = self.memory.constants + Constants(self.spec).scales + 192 * pairs
            load_shared(out, [f"e{i}" for i in range(4)], "shared + t * 16", at)
            for fragment in self.spec.fragments(pairs):
                self._keep_scaled(out, fragment, pairs)
        program_sync(out)

    def _keep_scaled(self, out: KernelWriter, fragment: int, pairs: int) -> None:
        """A turned word is ``cos`` times one kept word and ``sin`` times another: both members of
        the query by the scale of either."""
        a0, a1, b0, b1 = (f"q{fragment}_{pairs}_{x}" for x in WORDS)
        text = ".reg .b32 x<4>;\n" + "".join(
            f"mul.rn.f16x2 x{i}, ${2 + i}, ${6 + i};\n" for i in range(4)
        )
        text += "st.shared.v4.b32 [$1], {x0, x1, x2, x3};"
        at = self.memory.query(pairs, fragment)
        for words, where in (
            ((a0, a1, b0, b1), at),
            ((b0, b1, a0, a1), at + self.memory.partner),
        ):
            inputs = [f"shared + {where} + lane * 16", *words, *(f"e{i}" for i in range(4))]
            out.ptx(text, ["_"], inputs, name="KEEP_SCALED")

    def page(self, out: KernelWriter) -> None:
        """What the bytes' centres and the zeros add to scores.

        Products leave ``level{fragment}_{0..3}``, a level for the fragment's even columns and one
        for the odd, twice; under token scales those of zeros are ``zeros{fragment}_{0, 1}``.
        """
        if not self.spec.series:
            return
        out("", "# scales into queries; what centres and zeros add to every score")
        scales = self.memory.constants + Constants(self.spec).scales
        for fragment in self._fragments:
            out(*(f"{name} = zero" for name in self._sums(fragment)))
        for pairs in self.spec.series:
            at = [scales + 192 * pairs + 64 * k for k in range(3)]
            if self.spec.rotates:  # scales are in the queries already
                load_shared(out, [f"e{i}" for i in range(4, 12)], "shared + t * 16", *at[1:])
            else:
                load_shared(out, [f"e{i}" for i in range(12)], "shared + t * 16", *at)
            for fragment in self._fragments:
                if not self.spec.rotates:
                    self._fold(out, fragment, pairs)
                self._levels(out, fragment, pairs)
        if not self.spec.scaled:
            return
        # Four different sums, lest the compiler assembles them anew for every product.
        for fragment in self._fragments:
            for i, little in enumerate(("0.0", "0.0", "1e-30", "1e-30")):
                out(f"level{fragment}_{i} = bytes{fragment}_{i % 2} + {little}")

    def _sums(self, fragment: int) -> list[str]:
        """What the products of levels add to: the same rows twice, or bytes' and zeros'."""
        if not self.spec.scaled:
            return [f"level{fragment}_{i}" for i in range(4)]
        return [f"{kind}{fragment}_{i}" for kind in ("bytes", "zeros") for i in range(2)]

    @property
    def _fragments(self) -> range:
        return self.spec.fragments(self.spec.explicit)

    def _fold(self, out: KernelWriter, fragment: int, pairs: int) -> None:
        """``p{fragment}_{pairs}_..``: query words times scales, where nothing turns."""
        names = [f"q{fragment}_{pairs}_{x}" for x in WORDS]
        target = [f"p{fragment}_{pairs}_{x}" for x in WORDS]
        text = "".join(f"mul.rn.f16x2 ${i}, ${4 + i}, ${8 + i};\n" for i in range(4))
        inputs = [*names, *(f"e{i}" for i in range(4))]
        out.ptx(text, target, inputs, pure=True, name="FOLD")

    def _levels(self, out: KernelWriter, fragment: int, pairs: int) -> None:
        """Add what a group's centres and zeros add to every score.

        Bytes come as 1024 + u and mean u - bias. Without token scales the zeros contain that; they
        are whole numbers then, exact in halves from -2048 on, and off by one below. With them the
        first eight rows of the product are the bytes', the others the zeros'.
        """
        kept = "q" if self.spec.rotates else "p"
        queries = [f"{kept}{fragment}_{pairs}_{x}" for x in WORDS]
        sums = self._sums(fragment)
        d, b = registers(0, 4), registers(4, 4)
        text = product(d, registers(12, 4), b[:2], registers(8, 4))
        text += product(d, registers(16, 4), b[2:], d)
        inputs = [*queries, *sums, *(f"e{i}" for i in range(4, 12))]
        kinds = "rrrrffff" + "r" * 8
        out.ptx(text, sums, inputs, kinds=kinds, into="ffff", name="LEVEL")
