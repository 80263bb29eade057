"""The softmax of a page, and the sum of its values.

Weights times token scales are 16-bit fixed-point numbers relative to the largest scale of the page
and the largest weight of the query in it, split in two bytes: columns of an integer product with
the table bytes, which is exact. Zeros are summed apart, gains and offsets applied at the end.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

from kvquant_compile.lowering.gluon.fragments import (
    ONES,
    byte_product,
    load_codes,
    load_shared,
    lookup,
    reduce_lanes,
    table_words,
    unpack,
    upper,
)
from kvquant_compile.lowering.gluon.memory import Constants, Memory
from kvquant_compile.lowering.gluon.slots import FIXED_ONE, FLUSH_PAGES, ValueSlotEmitter
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.visibility import HIDDEN
from kvquant_compile.lowering.gluon.writer import KernelWriter, approximate, registers
from kvquant_compile.lowering.triton.spec import table_bias

LOG2_ONE = 15.98815209769
"""log2 of 65000, the fixed-point one: below 2**16 by more than the rounding of large scores, which
would carry the largest weight out of its two bytes."""

MAGIC = 1.25 * 2.0**23
"""Integer products start from its bits, and are then floats that much too large: no conversion.
A page's products stay within 2**21: 64 tokens, table bytes up to 127, weight bytes up to 255."""

LOWEST = "-1e13"
"""Below it a page's largest score is a hidden token's, and products of those with a unit are not to
be subtracted: their rounding alone is enormous."""


@dataclass(frozen=True)
class ValueEmitter:
    """Writes sums ``sum{group}_{i}`` of the lane's channels, with ``peak``, ``mass``, ``flat``."""

    spec: GluonSpec
    memory: Memory
    slots: ValueSlotEmitter

    @property
    def _groups(self) -> range:
        return range(self.spec.groups)

    def prologue(self, out: KernelWriter) -> None:
        """The table in registers; zeroed sums."""
        at = self.memory.constants + Constants(self.spec).tables + 64
        load_shared(out, [f"value_table{i}" for i in range(4)], "shared + t * 16", at)
        for group in self._groups:
            out(f"peak{group} = zero + {HIDDEN}", f"mass{group} = zero", f"flat{group} = zero")
            out(f"excess{group} = zero  # by which all sums are too large")
            out(*(f"sum{group}_{i} = zero" for i in range(4 * self.spec.value_groups)))
        text = f"mov.b32 $0, 0x{_bits(MAGIC):08X};"  # opaque: made once, not for every product
        out.ptx(text, ["magic"], ["lz"], name="MAGIC")
        self.slots.prologue(out)

    def load_tokens(self, out: KernelWriter) -> None:
        """Words ``w{j}`` of scale and zero, and slots, of the lane's tokens."""
        at = self.spec.layout.offsets["value_scale_zero"][0]
        load_shared(out, [f"w{j}" for j in range(8)], "here + g * 16", at, at + 128)
        self.slots.load(out)

    def softmax(self, out: KernelWriter) -> None:
        """Weights as bytes ``byte{group}_{chunk}_{0,1}``, and the running state."""
        out("", "# softmax: weights relative to the largest of the page")
        self._largest_scale(out)
        self.slots.bound(out)
        for group in self._groups:
            self._weights(out, group)
        self._rescale(out)

    def _largest_scale(self, out: KernelWriter) -> None:
        """``widest``: the page's largest token scale; weights get ``2**room`` larger."""
        n = 8
        text = ".reg .b32 x;\nmax.f16x2 x, $1, $2;\n"
        text += "".join(f"max.f16x2 x, x, ${i};\n" for i in range(3, n + 1)) + "mov.b32 $0, x;"
        out.ptx(text, ["widest"], [f"w{j}" for j in range(n)], pure=True, name="MAX_HALVES")
        for lane in (4, 8, 16):
            text = f".reg .b32 x; shfl.sync.bfly.b32 x, $1, {lane}, 31, -1; max.f16x2 $0, $1, x;"
            out.ptx(text, ["widest"], ["widest"], pure=True, name="MAX_LANES")
        out.ptx(_LOWER, ["widest"], ["widest"], into="f", pure=True, name="LOWER_HALF")
        out("widest = gl.maximum(widest, 1e-7)")
        approximate(out, "lg2", "room", "widest")
        out(f"room = {LOG2_ONE} - room")
        for j in range(n):
            out.ptx(_LOWER, [f"step{j}"], [f"w{j}"], into="f", pure=True, name="LOWER_HALF")
            out.ptx(_UPPER, [f"mean{j}"], [f"w{j}"], into="f", pure=True, name="UPPER_HALF")
        bias = table_bias(self.spec.layout.spec.value_bits)
        if self.spec.layout.spec.value_bits == 4:  # bytes are entry + bias there
            out(*(f"mean{j} = mean{j} - step{j} * {float(bias)}" for j in range(n)))

    def _weights(self, out: KernelWriter, group: int) -> None:
        unit = f"unit{group}"
        if self.spec.softcap:
            for j in range(8):
                self._cap(out, f"s{group}_{j}", f"s{group}_{j} * {unit}")
            unit = "1.0"
        out(f"high = s{group}_0", *(f"high = gl.maximum(high, s{group}_{j})" for j in range(1, 8)))
        reduce_lanes(out, "high", "gl.maximum({}, {})")
        out(
            f"top = gl.maximum(high * {unit}, {LOWEST})",
            "ground = top - room",
            "page_mass = zero", "page_flat = zero",
        )  # fmt: skip
        for j in range(8):
            approximate(out, "ex2", f"weight{j}", f"s{group}_{j} * {unit} - ground")
            out(
                f"page_mass += weight{j}",
                f"page_flat += weight{j} * mean{j}",
                f"fixed{j} = (weight{j} * step{j} + 8388608.0).to(gl.int32, bitcast=True)",
            )
        for j in range(0, 8, 2):
            text = (
                ".reg .b32 x; prmt.b32 x, $1, $2, 0x4051;"
                " movmatrix.sync.aligned.m8n8.trans.b16 $0, x;"
            )
            name = f"byte{group}_{j // 4}_{j // 2 % 2}"
            out.ptx(text, [name], [f"fixed{j}", f"fixed{j + 1}"], name="BYTES")
        out(f"grown = gl.maximum(peak{group}, top)")
        approximate(out, "ex2", "relative", "top - grown")
        approximate(out, "ex2", f"decay{group}", f"peak{group} - grown")
        if self.slots.count:
            out(f"unit_share = relative * widest * ({FIXED_ONE / 65535.0} / wider)")
            out(*(f"share{group}_{j} = weight{j} * unit_share" for j in range(8)))
            out("page_flat += poison")
        out(
            f"peak{group} = grown",
            f"growth{group} = relative * widest",
            f"mass{group} = mass{group} * decay{group} + page_mass * growth{group}",
            f"flat{group} = flat{group} * decay{group} + page_flat * growth{group}",
        )

    def _cap(self, out: KernelWriter, target: str, score: str) -> None:
        """Soft-cap, ``cap tanh(x / cap)``, in units of log 2; masked scores stay low."""
        out(f"x = {score}")
        approximate(out, "ex2", "e", "x / softcap * 2.885390081777927")
        approximate(out, "rcp", "e", "e + 1.0")
        out(
            f"{target} = gl.where({target} > -1e29,"
            f" softcap * (1.0 - 2.0 * e) * 1.4426950408889634, {target})"
        )

    def _rescale(self, out: KernelWriter) -> None:
        """Scale the sums where any maximum moved: rare, so it is worth a branch."""
        out("least = decay0")
        for group in self._groups[1:]:
            out(f"least = gl.minimum(least, decay{group})")
        text = ".reg .pred p; setp.neu.f32 p, $1, 0f3F800000;\n"
        inputs, kinds = ["least"], "f"
        if self.slots.count:
            text += "setp.gt.or.f32 p, $2, $3, p;\n"
            inputs, kinds = ["least", "wider", "reach"], "fff"
        text += "vote.sync.any.pred p, p, -1; selp.u32 kvq_flag, 1, 0, p;"
        out.ptx(text, ["_"], inputs, kinds=kinds, name="MOVED")
        out.ptx("mov.u32 $0, kvq_flag;", ["moves"], ["turn"], name="GET_FLAG")
        condition = "moves != 0"
        if self.slots.count:
            condition = f"(moves != 0) | (since_flush >= {FLUSH_PAGES - 1})"
            out("since_flush += 1")
        with out.block(f"if {condition}:"):
            if self.slots.count:
                self.slots.flush(out)
                out("reach = wider", "since_flush = since_flush * 0")
            for group in self._groups:
                for q in range(self.spec.value_groups):
                    self._scale(out, group, q)
        if self.slots.count:
            self.slots.add(out)

    def _scale(self, out: KernelWriter, group: int, q: int) -> None:
        """Scale four sums. Not pure: the compiler would do it always, and select."""
        sums = [f"sum{group}_{4 * q + i}" for i in range(4)]
        text = "".join(f"mul.rn.f32 ${i}, ${4 + i}, $8;\n" for i in range(4))
        out.ptx(text, sums, [*sums, f"decay{group}"], kinds="fffff", into="ffff", name="SCALE_SUMS")

    def accumulate(self, out: KernelWriter, chunk: int) -> None:
        """Add a chunk's products to ``total{group}_{tile}_{0..3}``."""
        bits = self.spec.layout.spec.value_bits
        count = self.spec.value_groups * bits
        words = [f"v{i}" for i in range(count)]
        base = self.memory.key_bytes
        out("", f"# values of chunk {chunk}")
        load_codes(out, words, "here", base + chunk * 128 * count)
        table = [f"value_table{i}" for i in range(table_words(bits))]
        text = self._product_text(len(table))
        selectors: list[str] = []
        for index in range(0, 4 * self.spec.value_groups, 2):
            if index % 4 == 0:
                selectors = unpack(out, words, bits, index // 4)
            totals = [f"total{g}_{index // 2}_{i}" for g in self._groups for i in range(4)]
            weights = [f"byte{g}_{chunk}_{i}" for g in self._groups for i in range(2)]
            before = totals if chunk else ["magic"] * len(totals)
            inputs = [*selectors[index % 4 : index % 4 + 2], *table, *weights, *before]
            out.ptx(text, totals, inputs, pure=True, name="VALUES")

    def _product_text(self, table_size: int) -> str:
        groups = self.spec.groups
        n = 4 * groups
        table = registers(n + 2, table_size)
        weights = registers(n + 2 + table_size, 2 * groups)
        before = n + 2 + table_size + 2 * groups
        text = f".reg .b32 y, tmp, one; .reg .b32 a<4>; mov.b32 one, {ONES};\n"
        for i in range(2):
            selector = f"${n + i}"
            text += lookup(f"a{2 * i}", selector, table) + upper("y", selector, table)
            text += lookup(f"a{2 * i + 1}", "y", table)
        for group in range(groups):
            d, b = registers(4 * group, 4), weights[2 * group : 2 * group + 2]
            start = registers(before + 4 * group, 4)
            text += byte_product(d, [f"a{i}" for i in range(4)], b, start)
        return text

    def finish(self, out: KernelWriter) -> None:
        """Add the page's sums, and to ``excess`` what they are too large by."""
        for group in self._groups:
            growth = f"growth{group}"
            out(
                f"upper = {growth} * 256.0",
                f"excess{group} = excess{group} * decay{group} + {growth} * {257 * MAGIC}",
            )
            for tile, r in itertools.product(range(2 * self.spec.value_groups), range(2)):
                name, total = f"sum{group}_{2 * tile + r}", f"total{group}_{tile}"
                for i, factor in ((2 * r, "upper"), (2 * r + 1, growth)):
                    out(f"{name} += {total}_{i}.to(gl.float32, bitcast=True) * {factor}")


def _bits(x: float) -> int:
    return int.from_bytes(struct.pack("<f", x), "little")


_LOWER = ".reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l;"
_UPPER = ".reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h;"
