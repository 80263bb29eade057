"""Queries as matrix fragments: loaded and normalised once, turned back to every page's base."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kvquant_compile.lowering.gluon.fragments import HALVES, load_shared, reduce_lanes, warp_sync
from kvquant_compile.lowering.gluon.memory import Constants, Memory
from kvquant_compile.lowering.gluon.spec import COLUMN_GROUP, GluonSpec
from kvquant_compile.lowering.gluon.writer import KernelWriter
from kvquant_compile.lowering.series import MOST_TERMS
from kvquant_compile.lowering.turns import EXPLICIT_EXPONENT

_PARTS = [(member, half) for member in range(2) for half in range(2)]


@dataclass(frozen=True)
class QueryEmitter:
    """Writes fragment words ``q{fragment}_{pairs}_{a0|a1|b0|b1}``.

    Where a rotation is a series, a query takes as many columns of a product as that has terms,
    and every group of columns has a fragment. Elsewhere it takes its first column; the next one
    holds the query of the second group, or, without one, the same query turned back by a token.
    """

    spec: GluonSpec
    memory: Memory

    def load(self, out: KernelWriter) -> None:
        """Ask for all that :meth:`prologue` needs, before anything is waited for."""
        out("", "# what queries are made of")
        warp_sync(out)  # or the compiler loads this first, and the page that is waited for later
        out("key_scale = gl.load(key_unit + head)")
        for pairs, half, low in self._pairs():
            at, name = f"{16 * pairs + 8 * half + low} + t * 2", f"{pairs}_{half}{low}"
            if self.spec.reorder:
                for member in range(2):
                    first = member * self.spec.pairs
                    out(f"order_{member}_{name} = gl.load(query_order + {first} + {at})")
            if self.spec.stretched:
                out(f"stretch_{name} = gl.load(rope_scale + {at})")
            if self._combines(pairs):
                row = f"head * {self.spec.pairs} + {at}"
                column = f"({row}) * {MOST_TERMS} + (g & {self.spec.terms - 1})"
                address = f"(coefficients + ({column}) * 2).to(gl.int64)"
                names = [f"same_{name}", f"other_{name}"]
                text = "ld.global.v2.f32 {$0, $1}, [$2];"
                out.ptx(text, names, [address], kinds="l", into="ff", name="COEFFICIENTS")
        for group in range(self.spec.groups):
            self._load_column(out, group)

    def prologue(self, out: KernelWriter) -> None:
        """Normalise and store (or, without RoPE, keep) all fragments."""
        out("", "# queries, each over its largest magnitude", "odd = g & 1")
        if self.spec.span > 1:
            out(f"degree = g & {self.spec.terms - 1}")
        for group in range(self.spec.groups):
            self._normalise(out, group)
        for pairs in range(self.spec.key_groups):
            for fragment in self.spec.fragments(pairs):
                self._fragment(out, fragment, pairs)
        if self.spec.rotates:
            self._angle_addresses(out)

    def _pairs(self) -> Iterator[tuple[int, int, int]]:
        """(group of pairs, half, low) of the lane's pairs."""
        return itertools.product(range(self.spec.key_groups), range(2), range(2))

    def _load_column(self, out: KernelWriter, group: int) -> None:
        """The lane's elements ``raw{group}_{pairs}_{member}{half}{low}`` of a query as it is."""
        columns, bits = self.spec.columns, self.spec.span.bit_length()
        out(
            f"column = tile * {columns} + {COLUMN_GROUP * group} + (g >> {bits})",
            "real = column < rep * steps",
            "rows = query + row.to(gl.int64) * query_batch"
            " + (head * rep + column // steps) * query_head_stride + (column % steps) * query_step",
        )
        for (pairs, half, low), member in itertools.product(self._pairs(), range(2)):
            first = member * self.spec.pairs + 16 * pairs + 8 * half + low
            channel, mask = f"{first} + t * 2", "real"
            if self.spec.reorder:
                channel = f"order_{member}_{pairs}_{half}{low}"
                mask = f"real & ({channel} < {self.spec.layout.key_dim})"
            name = f"raw{group}_{pairs}_{member}{half}{low}"
            out(f"{name} = gl.load(rows + {channel}, mask={mask}, other=0.0)")

    def _normalise(self, out: KernelWriter, group: int) -> None:
        """``unit{group}``: what a score is to be multiplied by, for the lane's own query."""
        out("largest = zero")
        for (pairs, half, low), member in itertools.product(self._pairs(), range(2)):
            element = f"{group}_{pairs}_{member}{half}{low}"
            x = f"x{element}"
            stretch = f" * stretch_{pairs}_{half}{low}" if self.spec.stretched else ""
            out(
                f"{x} = raw{element}.to(gl.float32){stretch}",
                f"largest = gl.maximum(largest, gl.abs({x}))",
            )
        reduce_lanes(out, "largest", "gl.maximum({}, {})", lanes=(1, 2))
        out("largest = gl.maximum(largest, 1e-12)", f"inverse{group} = 1.0 / largest")
        text = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
        out.ptx(text, ["own"], ["largest", "t * 8"], kinds="fr", into="f", name="FROM_LANE")
        log = "" if self.spec.softcap else " * 1.4426950408889634"
        out(f"unit{group} = own * (scale * key_scale{log})")

    def _fragment(self, out: KernelWriter, fragment: int, pairs: int) -> None:
        names = {}
        for part in _PARTS:
            values = [self._element(fragment, pairs, *part, low) for low in range(2)]
            name = f"q{fragment}_{pairs}_{'ab'[part[0]]}{part[1]}"
            out.ptx(HALVES, [name], values, kinds="ff", pure=True, name="HALVES")
            names[part] = name
        if self.spec.rotates and pairs < self.spec.explicit:  # others are scaled first
            at = self.memory.query(pairs, fragment)
            text = "st.shared.v4.b32 [$1], {$2, $3, $4, $5};"
            words = [names[part] for part in _PARTS]
            out.ptx(text, ["_"], [f"shared + {at} + lane * 16", *words], name="STORE16")

    def _element(self, fragment: int, pairs: int, member: int, half: int, low: int) -> str:
        """An element of a lane's own column, before rounding."""

        def query(group: int, member: int) -> str:
            return f"x{group}_{pairs}_{member}{half}{low} * inverse{group}"

        if self._combines(pairs):
            name, sign = f"{pairs}_{half}{low}", "-" if member else "+"
            crossed = f"{query(fragment, 1 - member)} * other_{name}"
            return f"{query(fragment, member)} * same_{name} {sign} {crossed}"
        other = query(1, member) if self.spec.groups == 2 else "0.0"
        larger = f" * {float(2**EXPLICIT_EXPONENT)}" if self.spec.rotates else ""
        column = "odd" if self.spec.span == 1 else "degree"
        return f"gl.where({column} == 0, {query(0, member)}, {other}){larger}"

    def _combines(self, pairs: int) -> bool:
        """Whether columns hold sums of a query's members: terms of a series, or a token back."""
        return self.spec.rotates and (pairs >= self.spec.explicit or self.spec.neighbours)

    def _angle_addresses(self, out: KernelWriter) -> None:
        """Where the lane's angles of a page's base go; a lane works out one word of either."""
        m, constants = self.memory, self.memory.constants + Constants(self.spec).turns
        words = 8 * self.spec.key_groups
        out(f"angles = shared + {m.angles} + warp * {m.angle_bytes}")
        for k in range(-(-words // 32)):
            out(
                f"word = gl.minimum(lane + {32 * k}, {words - 1})",
                f"turns{k} = shared + {constants} + word * 16",
                f"angle{k} = angles + (word >> 3) * 64 + (word & 3) * 16 + (word & 4)",
            )

    def page(self, out: KernelWriter) -> None:
        """Turn the queries back to the page's base; without RoPE they stay as they are."""
        if not self.spec.rotates:
            return
        out("", "# queries turned back to the middle of the page")
        for k in range(-(-8 * self.spec.key_groups // 32)):
            out.ptx(_ANGLE, ["_"], [f"turns{k}", f"angle{k}", "base + 32"], name="ANGLE")
        warp_sync(out)
        for pairs in range(self.spec.key_groups):
            load_shared(out, ["c0", "c1", "d0", "d1"], "angles + t * 16", 64 * pairs)
            for fragment in self.spec.fragments(pairs):
                self._turn(out, fragment, pairs)

    def _turn(self, out: KernelWriter, fragment: int, pairs: int) -> None:
        at = [self.memory.query(pairs, fragment)]
        words, crossed = ["y0", "y1", "y2", "y3"], ["y2", "y3", "y0", "y1"]
        if pairs >= self.spec.explicit:  # kept with either member's scale
            at.append(at[0] + self.memory.partner)
            crossed = ["y4", "y5", "y6", "y7"]
            words += crossed
        load_shared(out, words, "shared + lane * 16", *at)
        names = [f"q{fragment}_{pairs}_{x}" for x in ("a0", "a1", "b0", "b1")]
        inputs = [*words[:4], *crossed, "c0", "c1", "d0", "d1"]
        out.ptx(_TURN, names, inputs, pure=True, name="TURN")


# The angle of position p in turns is p f, modulo 1, in 32-bit fixed point: exact at any position.
_ANGLE = (
    ".reg .b32 x, y; .reg .b32 h0, l0, h1, l1; .reg .f32 e, f, s, c, u, v;\n"
    "ld.shared.v4.b32 {h0, l0, h1, l1}, [$1];\n"
    "mul.hi.s32 x, $3, l0; mad.lo.s32 x, $3, h0, x;\n"
    "mul.hi.s32 y, $3, l1; mad.lo.s32 y, $3, h1, y;\n"
    "cvt.rn.f32.s32 e, x; cvt.rn.f32.s32 f, y;\n"
    "mul.rn.f32 e, e, 0f30C90FDB; mul.rn.f32 f, f, 0f30C90FDB;\n"
    "cos.approx.ftz.f32 c, e; sin.approx.ftz.f32 s, e;\n"
    "cos.approx.ftz.f32 u, f; sin.approx.ftz.f32 v, f;\n"
    "cvt.rn.f16x2.f32 x, u, c; cvt.rn.f16x2.f32 y, v, s;\n"
    "st.shared.b32 [$2], x; st.shared.b32 [$2+8], y;"
)

# Words a0, a1, b0, b1 by the cosine, and their partners by the sine.
_TURN = ".reg .b32 t;\n" + "".join(
    f"mul.rn.f16x2 t, ${8 + i}, ${14 + i % 2};{' neg.f16x2 t, t;' * (i // 2)}"
    f" fma.rn.f16x2 ${i}, ${4 + i}, ${12 + i % 2}, t;\n"
    for i in range(4)
)
