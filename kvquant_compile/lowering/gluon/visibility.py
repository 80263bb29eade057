"""Which tokens of a page count, and the position that the page's rotation starts from.

On the fast way all 64 tokens of a page are seen by every query and their positions are
consecutive. Other pages are read once for every offset between position and slot that occurs,
lowest first, with the other tokens masked out; ordinary ones take a single such pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.gluon.fragments import load_shared
from kvquant_compile.lowering.gluon.memory import Memory
from kvquant_compile.lowering.gluon.spec import COLUMN_GROUP, GluonSpec
from kvquant_compile.lowering.gluon.writer import KernelWriter

TOKENS = [32 * chunk + 2 * tile + r for chunk in range(2) for tile in range(2) for r in range(2)]
"""A lane's eight tokens, counted from the first of its group g, which is 4 g."""

HIDDEN = "-1e34"
"""A hidden token's score; its product with any query's unit stays finite and far below others."""

NOTHING = "-1e12"
"""A largest score below this belongs to a query that saw no token."""

NOWHERE = "2147483647"
NO_BASE = "-2147483648"


@dataclass(frozen=True)
class VisibilityEmitter:
    """Writes ``slow`` (scalar), ``base`` and ``visible`` of a page, and applies the masks."""

    spec: GluonSpec
    memory: Memory

    def load(self, out: KernelWriter) -> None:
        """Ask for the length, the first query's slot and what the ring begins with; ``first_page``,
        where it depends on none of them."""
        out("limit = gl.load(history + row)", "first_slot = gl.load(slots + row * slot_row)")
        if ring := self.spec.layout.ring:
            self._load_ring(out, ring)
        if not self.spec.window:
            out(f"first_page = SINKS // {PAGE_TOKENS}")

    def prologue(self, out: KernelWriter) -> None:
        """The tokens [begin, end) that some query sees, [whole_begin, whole_end) that all do."""
        sinks = "SINKS"
        out(
            "", "# tokens [begin, end) are seen by some query, [whole_begin, whole_end) by all",
            "lowest = first_slot",
            f"oldest = gl.where(first_slot < 0, {NOWHERE}, first_slot)",
            "newest = gl.maximum(first_slot, -1)",
        )  # fmt: skip
        with out.block("for step in range(1, steps):"):
            out(
                "slot = gl.load(slots + row * slot_row + step)",
                "lowest = gl.minimum(lowest, slot)",
                "newest = gl.maximum(newest, slot)",
                f"oldest = gl.minimum(oldest, gl.where(slot < 0, {NOWHERE}, slot))",
            )
        with out.block("if not EXACT:"):
            out("limit = gl.maximum(limit, newest + 1)")
        if self.spec.layout.ring:
            out("limit = gl.minimum(limit, held)")
        out(
            "end = gl.minimum(limit, newest + 1)",
            "whole_end = gl.minimum(limit, lowest + 1)",
            f"begin = limit * 0 + {sinks}",
            "whole_begin = begin",
        )
        if self.spec.window:
            out(
                "begin = gl.maximum(begin, oldest - window + 1)",
                "whole_begin = gl.maximum(begin, newest - window + 1)",
            )
        size = PAGE_TOKENS
        out(
            *([f"first_page = begin // {size}"] if self.spec.window else []),
            f"units = gl.maximum((end + {size - 1}) // {size} - begin // {size}, 0)",
            "units = gl.where(split < 0, 0, units)  # the first program reads no pages",
            "floor = limit * 0 + " + NO_BASE,
        )

    def _load_ring(self, out: KernelWriter, ring: int) -> None:
        """``held``, the first token in the ring, which is read beside the pages."""
        width = 2 * self.spec.pairs + self.spec.layout.value_dim
        rows = f"row.to(gl.int64) * heads * {self.spec.exact_rows} + SINKS + {ring}"
        out(f"held = gl.load((sinks + ({rows}) * {width}).to(gl.pointer_type(gl.int32)))")

    def page(self, out: KernelWriter) -> None:
        """Decide about the page of this turn; ``again`` is 1 where it has to be read once more."""
        out("", "# positions", f"first = (first_page + turn) * {PAGE_TOKENS}")
        self._check(out)
        edge = f"(first < whole_begin) | (first + {PAGE_TOKENS} > whole_end)"
        out.ptx("mov.u32 $0, kvq_flag;", ["uneven"], ["turn"], name="GET_FLAG")
        out(f"slow = ({edge}) | (uneven != 0)", "again = turn * 0", "visible = lz + 255")
        with out.block("if slow:"):
            self._slow(out)

    def _check(self, out: KernelWriter) -> None:
        """``base``, the first token's position, and the flag: set where tokens are hidden or,
        with RoPE, positions not consecutive. A lane looks at two tokens."""
        text = ".reg .b32 p, q, x; .reg .pred f;\n"
        text += f"ld.shared.v2.b32 {{p, q}}, [$1+{self.memory.positions}];\n"
        if self.spec.rotates:
            text += (
                "shfl.sync.idx.b32 $0, p, 0, 31, -1; sub.s32 q, q, p; sub.s32 q, q, 1;\n"
                ".reg .b32 y; sub.s32 y, p, $0; sub.s32 y, y, $2; and.b32 x, p, 0x80000000;\n"
                "or.b32 x, x, y; or.b32 x, x, q;\n"
            )
        else:
            text += "mov.b32 $0, p; or.b32 x, p, q; and.b32 x, x, 0x80000000;\n"
        text += "setp.ne.u32 f, x, 0; vote.sync.any.pred f, f, -1; selp.u32 kvq_flag, 1, 0, f;"
        out.ptx(text, ["base"], ["here + lane * 8", "lane * 2"], name="CHECK")

    def _slow(self, out: KernelWriter) -> None:
        """Pick the lowest offset above the last pass's, and the tokens that have it."""
        p = self.memory.positions
        load_shared(out, [f"at{j}" for j in range(8)], "here + g * 16", p, p + 128)
        for j, token in enumerate(TOKENS):
            out(
                f"slot{j} = first + g * 4 + {token}",
                f"live{j} = (slot{j} >= begin) & (slot{j} < end) & (at{j} >= 0)",
            )
        if not self.spec.rotates:
            self._bits(out, [f"live{j}" for j in range(8)])
            return
        for j, token in enumerate(TOKENS):
            out(
                f"offset{j} = at{j} - g * 4 - {token}",
                f"offset{j} = gl.where(live{j} & (offset{j} > floor), offset{j}, {NOWHERE})",
            )
        out("base = offset0", *(f"base = gl.minimum(base, offset{j})" for j in range(1, 8)))
        text = "redux.sync.min.s32 $0, $1, -1;"
        out.ptx(text, ["base"], ["base"], pure=True, name="LEAST")
        self._bits(out, [f"(offset{j} == base) & (offset{j} != {NOWHERE})" for j in range(8)])
        rest = " | ".join(
            f"((offset{j} != base) & (offset{j} != {NOWHERE}))" for j in range(8)
        )  # fmt: skip
        out.ptx(
            ".reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.any.pred p, p, -1;"
            " selp.u32 kvq_flag, 1, 0, p;",
            ["_"], [f"({rest}).to(gl.int32)"], name="ANY",
        )  # fmt: skip
        out.ptx("mov.u32 $0, kvq_flag;", ["again"], ["turn"], name="GET_FLAG")
        # every lane holds the same base: make the scalar of it
        out.ptx("mov.u32 kvq_flag, $1;", ["_"], ["base"], name="SET_FLAG")
        out.ptx("mov.u32 $0, kvq_flag;", ["floor"], ["turn"], name="GET_FLAG")
        out(f"floor = gl.where(again != 0, floor, {NO_BASE})")

    def _bits(self, out: KernelWriter, conditions: list[str]) -> None:
        terms = [f"gl.where({c}, {1 << j}, 0)" for j, c in enumerate(conditions)]
        out("visible = " + " | ".join(terms))

    def mask(self, out: KernelWriter) -> None:
        """Hide scores ``s{group}_{j}``, and scales and zeros ``w{j}`` of hidden tokens' values."""
        with out.block("if slow:"):
            for group in range(self.spec.groups):
                self._columns(out, group)
                for j, token in enumerate(TOKENS):
                    shown = f"(first + g * 4 + {token} < stop)"
                    if self.spec.window:
                        shown += f" & (first + g * 4 + {token} >= start)"
                    shown += f" & ((visible & {1 << j}) != 0)"
                    out(f"s{group}_{j} = gl.where({shown}, s{group}_{j}, {HIDDEN})")
            for j in range(8):
                out(f"w{j} = gl.where((visible & {1 << j}) != 0, w{j}, 0)")

    def _columns(self, out: KernelWriter, group: int) -> None:
        """``start`` and ``stop``: tokens that the lane's query sees."""
        columns = self.spec.columns
        out(
            f"column = tile * {columns} + {COLUMN_GROUP * group} + (t >> {self.spec.span // 2})",
            "slot = gl.load(slots + row * slot_row + column % steps,"
            " mask=column < rep * steps, other=newest)",
            "stop = gl.minimum(limit, slot + 1)",
        )
        if self.spec.window:
            out("start = slot - window + 1")
