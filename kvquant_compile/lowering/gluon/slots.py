"""Outlier slots: a few exact residuals of every token, added to scores and to sums.

A slot is a channel (one byte) and a float16 residual. Keys: a residual is turned by its token's
position and meets the query, gathered from ``[pair][4 heads]`` halves (a, b). Values: a weight
times a residual is added, in fixed point, to ``[channel][4 heads]``. The head comes last, so that
the four lanes of a token reach four memory banks.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.gluon.fragments import HALVES, warp_sync
from kvquant_compile.lowering.gluon.memory import Constants, Memory
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.writer import KernelWriter

HEADROOM = 64.0
"""Residuals meet queries this much smaller, so that large ones stay finite halves."""

FLUSH_PAGES = 16
FIXED_ONE = 2.0**20
"""The largest product of a weight and a residual, in fixed point; 16 pages of 64 such fit."""


@dataclass(frozen=True)
class KeySlotEmitter:
    """Adds key residuals to the scores."""

    spec: GluonSpec
    memory: Memory

    @property
    def _count(self) -> int:
        return self.spec.layout.spec.key_slots

    def prologue(self, out: KernelWriter) -> None:
        """Queries of the fragments as [pair][head] (a, b), for all warps alike."""
        if not self._count:
            return
        text = (
            ".reg .pred p; .reg .b32 x, y; setp.eq.u32 p, $4, 0;\n"
            "prmt.b32 x, $2, $3, 0x5410; prmt.b32 y, $2, $3, 0x7632;\n"
            "@p st.shared.b32 [$1], x; @p st.shared.b32 [$1+16], y;"
        )
        bits = self.spec.span.bit_length()
        out("", f"scatter = shared + {self.memory.key_slots} + (g >> {bits}) * 4 + t * 32")
        for group in range(self.spec.groups):
            for pairs in range(self.spec.key_groups):
                fragment = min(group, self.spec.fragments(pairs)[-1])
                other = "odd" if fragment == group else "1 - odd"
                if self.spec.span > 1:
                    other = "degree"
                for half in range(2):
                    at = self.memory.key_slot_bytes * group + 256 * pairs + 128 * half
                    words = [f"q{fragment}_{pairs}_{member}{half}" for member in "ab"]
                    if self.spec.span > 1 and pairs >= self.spec.explicit:
                        words = self._whole(out, pairs, half)
                    inputs = [f"scatter + {at}", *words, other]
                    out.ptx(text, ["_"], inputs, name="KEEP_QUERY")

    @staticmethod
    def _whole(out: KernelWriter, pairs: int, half: int) -> list[str]:
        """Words of the query itself, of which fragments hold terms alone."""
        names = ["whole_a", "whole_b"]
        for member, name in enumerate(names):
            values = [f"x0_{pairs}_{member}{half}{low} * inverse0" for low in range(2)]
            out.ptx(HALVES, [name], values, kinds="ff", pure=True, name="HALVES")
        return names

    def add(self, out: KernelWriter, chunk: int) -> None:
        """Add the residuals of a chunk's tokens to their scores."""
        offsets = self.spec.layout.offsets
        for slot in range(self._count):
            index = offsets["key_slot_index"][0] + 64 * slot + 32 * chunk
            residual = offsets["key_slot_residual"][0] + 128 * slot + 64 * chunk
            position = self.memory.positions + 128 * chunk
            table = self.memory.constants + Constants(self.spec).outliers
            text = _rotator(index, residual, position, table)
            inputs = ["here + lane", "here + lane * 2", "here + lane * 4", "shared + lz"]
            out.ptx(text, ["rotator"], inputs, name="ROTATOR")
            names = [f"pair{i}" for i in range(4)]
            out.ptx(self._pairs(index), names, ["here + g * 4"], name="PAIRS")
            for group in range(self.spec.groups):
                region = self.memory.key_slots + self.memory.key_slot_bytes * group
                for i in range(4):
                    score = f"s{group}_{4 * chunk + i}"
                    head = f"shared + (t >> {self.spec.span // 2}) * 4"
                    inputs = [f"pair{i}", "rotator", head, score]
                    text = _add_text(i, region)
                    out.ptx(text, [score], inputs, kinds="rrrf", into="f", name="ADD_SLOT")

    def _pairs(self, index: int) -> str:
        """The pairs of the lane's four tokens."""
        text = f".reg .b32 c, x; ld.shared.b32 c, [$4+{index}];\n"
        pairs = self.spec.pairs
        if pairs & (pairs - 1) == 0:
            text += f"and.b32 c, c, 0x{f'{pairs - 1:02x}' * 4};\n"
        for i in range(4):
            text += f"prmt.b32 ${i}, c, 0, 0x444{i};\n"
            if pairs & (pairs - 1):  # less the number of pairs, where that is no negative number
                text += f"sub.u32 x, ${i}, {pairs}; min.u32 ${i}, ${i}, x;\n"
        return text


def _rotator(index: int, residual: int, position: int, table: int) -> str:
    """A lane works out the turned residual of its own token of four: (cos, sin) times the residual.

    The table holds, by channel, the frequency in turns as a 64-bit fraction (high, signed low),
    the phase (a quarter turn for member b) and the factor to the units of the queries.
    """
    return (
        ".reg .b32 c, h, l, o, f, p, x; .reg .f32 e, s, k, r; .reg .b16 w;\n"
        f"ld.shared.u8 c, [$1+{index}]; ld.shared.b16 w, [$2+{residual}];"
        f" ld.shared.b32 p, [$3+{position}];\n"
        f"mad.lo.u32 c, c, 16, $4; ld.shared.v4.b32 {{h, l, o, f}}, [c+{table}];\n"
        "mad.hi.s32 x, p, l, o; mad.lo.s32 x, p, h, x;\n"
        "cvt.rn.f32.s32 e, x; mul.rn.f32 e, e, 0f30C90FDB;\n"
        "cos.approx.ftz.f32 k, e; sin.approx.ftz.f32 s, e;\n"
        "cvt.f32.f16 r, w; mov.b32 e, f; mul.rn.f32 r, r, e;\n"
        "mul.rn.f32 k, k, r; mul.rn.f32 s, s, r; cvt.rn.f16x2.f32 $0, s, k;"
    )


def _add_text(token: int, region: int) -> str:
    """Add token ``token`` of the quad: its rotator comes from that lane, its query from memory."""
    return (
        ".reg .b32 x, e, c; .reg .b16 l, h; .reg .f32 f;\n"
        f"shfl.sync.idx.b32 c, $2, {token}, 0x1c03, -1; mad.lo.u32 x, $1, 16, $3;\n"
        f"ld.shared.b32 e, [x+{region}];\n"
        "mul.rn.f16x2 e, e, c; mov.b32 {l, h}, e; add.rn.f16 l, l, h;\n"
        f"cvt.f32.f16 f, l; fma.rn.f32 $0, f, {_float(HEADROOM)}, $4;"
    )


@dataclass(frozen=True)
class ValueSlotEmitter:
    """Sums weights times value residuals in fixed point, and flushes them into the sums."""

    spec: GluonSpec
    memory: Memory

    @property
    def count(self) -> int:
        """Slots of a token."""
        return self.spec.layout.spec.value_slots

    def prologue(self, out: KernelWriter) -> None:
        """Zero the fixed-point sums."""
        if not self.count:
            return
        size = self.memory.value_slot_bytes * self.spec.groups
        out(
            f"fixed = shared + {self.memory.value_slots} + warp * {size}",
            "reach = zero + 6.103515625e-05  # power of two above every residual so far",
            "since_flush = turn * 0",
        )
        for k in range(size // 512):
            text = "st.shared.v4.b32 [$1], {$2, $2, $2, $2};"
            out.ptx(text, ["_"], [f"fixed + lane * 16 + {512 * k}", "lz"], name="CLEAR16")

    def load(self, out: KernelWriter) -> None:
        """Words of the lane's tokens: channels ``where{slot}_{chunk}`` (four bytes), residuals
        ``rest{slot}_{i}`` (two halves)."""
        offsets = self.spec.layout.offsets
        for slot in range(self.count):
            index = offsets["value_slot_index"][0] + 64 * slot
            residual = offsets["value_slot_residual"][0] + 128 * slot
            text = (
                f"ld.shared.b32 $0, [$6+{index}]; ld.shared.b32 $1, [$6+{index + 32}];\n"
                f"ld.shared.v2.b32 {{$2, $3}}, [$7+{residual}];"
                f" ld.shared.v2.b32 {{$4, $5}}, [$7+{residual + 64}];"
            )
            names = [f"where{slot}_{i}" for i in range(2)] + [f"rest{slot}_{i}" for i in range(4)]
            out.ptx(text, names, ["here + g * 4", "here + g * 8"], name="SLOTS")

    def bound(self, out: KernelWriter) -> None:
        """``wider``: a power of two that bounds the page's residuals, at least ``reach``.

        ``poison`` is NaN where one is not finite, so that the output says so, and 0 elsewhere.
        """
        if not self.count:
            return
        words = [f"rest{slot}_{i}" for slot in range(self.count) for i in range(4)]
        text = ".reg .b32 x, y;\nand.b32 x, $2, 0x7fff7fff;\n"
        for i in range(3, len(words) + 2):  # NaN wins, as 0x7fff
            text += f"and.b32 y, ${i}, 0x7fff7fff; max.NaN.f16x2 x, x, y;\n"
        text += (
            "shr.u32 y, x, 16; and.b32 x, x, 0xffff; max.u32 x, x, y;\n"
            "redux.sync.max.u32 x, x, -1;\n"
            ".reg .b16 l, h; .reg .f32 f; mov.b32 {l, h}, x; cvt.f32.f16 f, l;\n"
            "mov.b32 y, f; and.b32 y, y, 0x7f800000; add.u32 y, y, 0x00800000;\n"
            ".reg .pred p; setp.ge.u32 p, x, 0x7c00; selp.b32 y, 0x3f800000, y, p;\n"
            "mov.b32 $0, y; selp.f32 $1, 0f7FC00000, 0f00000000, p;"
        )
        into = ["wider", "poison"]
        out.ptx(text, into, words, into="ff", pure=True, name="RESIDUAL_BOUND")
        out("wider = gl.maximum(wider, reach)")

    def add(self, out: KernelWriter) -> None:
        """Add ``share{group}_{j}`` (weight in fixed point) times the residuals."""
        for slot in range(self.count):
            for group in range(self.spec.groups):
                at = f"fixed + {self.memory.value_slot_bytes * group} + t * 4"
                for j in range(8):
                    words = [f"where{slot}_{j // 4}", f"rest{slot}_{j // 2}"]
                    inputs = [*words, at, f"share{group}_{j}"]
                    text = _add_residual(j)
                    out.ptx(text, ["_"], inputs, kinds="rrrf", name="ADD_RESIDUAL")

    def flush(self, out: KernelWriter) -> None:
        """Move the fixed-point sums into ``sum{group}_{i}``."""
        warp_sync(out)
        out(f"unfix = reach * {65535.0 / FIXED_ONE}")
        for group in range(self.spec.groups):
            for q in range(self.spec.value_groups):
                text = "".join(
                    f"ld.shared.b32 ${k}, [$4+{16 * k}]; st.shared.b32 [$4+{16 * k}], $5;\n"
                    for k in range(4)
                )
                rows = 16 * (self.spec.layout.value_dim // 8)
                at = self.memory.value_slot_bytes * group + 64 * q
                names = [f"f{i}" for i in range(4)]
                out.ptx(text, names, [f"fixed + t * 4 + g * {rows} + {at}", "lz"], name="TAKE")
                for i in range(4):
                    target = f"sum{group}_{4 * q + i}"
                    out(f"{target} += f{i}.to(gl.float32) * unfix")
        warp_sync(out)


def _add_residual(j: int) -> str:
    """Add the residual of the lane's j-th token: 2**23 + 2**22 makes an integer of a float."""
    half = "lh"[j % 2]
    return (
        ".reg .b32 x, v; .reg .f32 f; .reg .b16 l, h;\n"
        f"mov.b32 {{l, h}}, $2; cvt.f32.f16 f, {half}; fma.rn.f32 f, f, $4, 0f4B400000;"
        " mov.b32 v, f; sub.u32 v, v, 0x4B400000;\n"
        f"prmt.b32 x, $1, 0, 0x444{j % 4}; mad.lo.u32 x, x, 16, $3; red.shared.add.u32 [x], v;"
    )


def _float(x: float) -> str:
    """A float32 constant, for PTX."""
    import numpy

    return f"0f{int(numpy.float32(x).view(numpy.uint32)):08X}"
