"""Outlier slots: a few exact residuals of every token, added to scores and to sums.

A slot is a channel (one byte) and a float16 residual. They become words, residual above 16 times
the channel, which is also the byte offset of the channel's row in the gather regions below:
``[pair][4 heads]`` halves (a, b) of the turned queries, and ``[channel][4 heads]`` fixed-point sums
of values. The head comes last, so that the four lanes of a token reach four memory banks.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.hopper.fragments import warp_sync
from kvquant_compile.lowering.hopper.spec import Constants, HopperSpec, Memory
from kvquant_compile.lowering.hopper.writer import KernelWriter

HEADROOM = 64.0
"""Residuals meet queries this much smaller, so that large ones stay finite halves."""

FLUSH_PAGES = 16
FIXED_ONE = 2.0**20
"""The largest product of a weight and a residual, in fixed point; 16 pages of 64 such fit."""


def _load_words(
    out: KernelWriter, names: list[str], memory: Memory, kind: str, slot: int, chunk: int
) -> None:
    """The words of the lane's four tokens of a chunk."""
    offsets = memory.spec.layout.offsets
    index = offsets[f"{kind}_slot_index"][0] + 64 * slot + 32 * chunk
    residual = offsets[f"{kind}_slot_residual"][0] + 128 * slot + 64 * chunk
    text = (
        ".reg .b32 c, r0, r1, x;\n"
        f"ld.shared.b32 c, [$4+{index}]; ld.shared.v2.b32 {{r0, r1}}, [$5+{residual}];\n"
    )
    for i in range(4):
        half = "0x5410" if i % 2 == 0 else "0x7610"
        text += (
            f"prmt.b32 x, c, 0, 0x444{i}; mul.lo.u32 x, x, 16;"
            f" prmt.b32 ${i}, x, r{i // 2}, {half};\n"
        )
    out.ptx(text, names, ["here + g * 4", "here + g * 8"], name="SLOT_WORDS")


@dataclass(frozen=True)
class KeySlotEmitter:
    """Adds key residuals to the scores."""

    spec: HopperSpec
    memory: Memory

    @property
    def _count(self) -> int:
        return self.spec.layout.spec.key_slots

    def prologue(self, out: KernelWriter) -> None:
        """Addresses: ``gather`` to read, ``scatter`` to write the turned queries."""
        if not self._count:
            return
        size = self.memory.key_slot_bytes
        out(
            f"gather = shared + {self.memory.key_slots} + warp * {size * self.spec.groups}",
            "scatter = gather + (g >> 1) * 4 + t * 32",
            f"outliers = shared + {self.memory.constants + Constants(self.spec).outliers} + lz",
            "in_page = (lane - 32).to(gl.float32)",
        )

    def store_queries(self, out: KernelWriter) -> None:
        """Keep the turned queries (before scales) as [pair][head] (a, b)."""
        if not self._count:
            return
        text = (
            ".reg .pred p; .reg .b32 x, y; setp.eq.u32 p, $4, 0;\n"
            "prmt.b32 x, $2, $3, 0x5410; prmt.b32 y, $2, $3, 0x7632;\n"
            "@p st.shared.b32 [$1], x; @p st.shared.b32 [$1+16], y;"
        )
        warp_sync(out)
        for group in range(self.spec.groups):
            for pairs in range(self.spec.key_groups):
                for half in range(2):
                    at = self.memory.key_slot_bytes * group + 256 * pairs + 128 * half
                    words = [f"q{group}_{pairs}_{member}{half}" for member in "ab"]
                    inputs = [f"scatter + {at}", *words, "derivative"]
                    out.ptx(text, ["_"], inputs, name="KEEP_QUERY")
        warp_sync(out)

    def add(self, out: KernelWriter, chunk: int) -> None:
        """Add the residuals of a chunk's tokens to their scores."""
        for slot in range(self._count):
            words = [f"word{i}" for i in range(4)]
            _load_words(out, words, self.memory, "key", slot, chunk)
            out("mine = gl.where(t < 2, gl.where(t == 0, word0, word1),"
                " gl.where(t == 2, word2, word3))")  # fmt: skip
            inputs = ["mine", "outliers", f"in_page + {float(32 * chunk)}"]
            out.ptx(_ROTATOR, ["rotator"], inputs, kinds="rrf", name="ROTATOR")
            for group in range(self.spec.groups):
                for i in range(4):
                    score = f"s{group}_{4 * chunk + i}"
                    at = f"gather + {self.memory.key_slot_bytes * group} + t * 4"
                    inputs = [f"word{i}", "rotator", at, score]
                    text = _add_text(i, self.spec.pairs)
                    out.ptx(text, [score], inputs, kinds="rrrf", into="f", name="ADD_SLOT")


# A lane works out the turned residual of its own token of four: (cos, sin) times the residual.
# The table holds the channel's frequency, its phase (a quarter turn for member b) and a factor.
_ROTATOR = (
    ".reg .b32 x; .reg .f32 th, of, fa, un, ph, sn, cs, dl; .reg .b16 l, h;\n"
    "and.b32 x, $1, 0xfff0; add.u32 x, x, $2; ld.shared.v4.f32 {th, of, fa, un}, [x];\n"
    "fma.rn.f32 ph, th, $3, of; sin.approx.ftz.f32 sn, ph; cos.approx.ftz.f32 cs, ph;\n"
    "mov.b32 {l, h}, $1; cvt.f32.f16 dl, h; mul.rn.f32 dl, dl, fa;\n"
    "mul.rn.f32 cs, cs, dl; mul.rn.f32 sn, sn, dl; cvt.rn.f16x2.f32 $0, sn, cs;"
)


def _add_text(token: int, pairs: int) -> str:
    """Add token ``token`` of the quad: its rotator comes from that lane, its query from memory."""
    if pairs & (pairs - 1) == 0:
        row = f"and.b32 x, $1, {16 * pairs - 16};"
    else:  # the pair of a channel: less the number of pairs where that is no negative number
        row = f"and.b32 x, $1, 0xfff0; sub.u32 e, x, {16 * pairs}; min.u32 x, x, e;"
    return (
        ".reg .b32 x, e, c; .reg .b16 l, h; .reg .f32 f;\n"
        f"shfl.sync.idx.b32 c, $2, {token}, 0x1c03, -1; {row} add.u32 x, x, $3;\n"
        "ld.shared.b32 e, [x]; mul.rn.f16x2 e, e, c; mov.b32 {l, h}, e; add.rn.f16 l, l, h;\n"
        f"cvt.f32.f16 f, l; fma.rn.f32 $0, f, {_float(HEADROOM)}, $4;"
    )


@dataclass(frozen=True)
class ValueSlotEmitter:
    """Sums weights times value residuals in fixed point, and flushes them into the sums."""

    spec: HopperSpec
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
        """``rest{slot}_{j}``: words of the lane's tokens; ``largest_rest`` of the page."""
        for slot in range(self.count):
            for chunk in range(2):
                names = [f"rest{slot}_{4 * chunk + i}" for i in range(4)]
                _load_words(out, names, self.memory, "value", slot, chunk)

    def bound(self, out: KernelWriter) -> None:
        """``wider``: a power of two that bounds the page's residuals, at least ``reach``.

        ``poison`` is NaN where one is not finite, so that the output says so, and 0 elsewhere.
        """
        if not self.count:
            return
        words = [f"rest{slot}_{j}" for slot in range(self.count) for j in range(8)]
        n = len(words)
        text = ".reg .b32 x, y;\nand.b32 x, $2, 0x7fff0000;\n"
        for i in range(3, n + 2):
            text += f"and.b32 y, ${i}, 0x7fff0000; max.u32 x, x, y;\n"
        text += "redux.sync.max.u32 x, x, -1;\n"
        # halves of one sign compare like integers; NaN and infinity stay above all
        text += (
            ".reg .b16 l, h; .reg .f32 f; mov.b32 {l, h}, x; cvt.f32.f16 f, h;\n"
            "mov.b32 y, f; and.b32 y, y, 0x7f800000; add.u32 y, y, 0x00800000;\n"
            ".reg .pred p; setp.ge.u32 p, x, 0x7c000000; selp.b32 y, 0x3f800000, y, p;\n"
            "mov.b32 $0, y; selp.f32 $1, 0f7FC00000, 0f00000000, p;"
        )
        into = ["wider", "poison"]
        out.ptx(text, into, words, into="ff", pure=True, name="RESIDUAL_BOUND")
        out("wider = gl.maximum(wider, reach)")

    def add(self, out: KernelWriter) -> None:
        """Add ``share{group}_{j}`` (weight in fixed point) times the residuals."""
        text = (
            ".reg .b32 x, v; .reg .f32 f; .reg .b16 l, h;\n"
            "mov.b32 {l, h}, $1; cvt.f32.f16 f, h; fma.rn.f32 f, f, $3, 0f4B400000;"
            " mov.b32 v, f; sub.u32 v, v, 0x4B400000;\n"
            "and.b32 x, $1, 0xfff0; add.u32 x, x, $2; red.shared.add.u32 [x], v;"
        )
        for slot in range(self.count):
            for group in range(self.spec.groups):
                at = f"fixed + {self.memory.value_slot_bytes * group} + t * 4"
                for j in range(8):
                    inputs = [f"rest{slot}_{j}", at, f"share{group}_{j}"]
                    out.ptx(text, ["_"], inputs, kinds="rrf", name="ADD_RESIDUAL")

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


def _float(x: float) -> str:
    """A float32 constant, for PTX."""
    import numpy

    return f"0f{int(numpy.float32(x).view(numpy.uint32)):08X}"

