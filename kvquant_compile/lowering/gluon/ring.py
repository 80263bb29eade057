"""Pages on their way: their order, their addresses, and when they are copied.

A warp's keys and values are each refilled as soon as they have been read: the next keys arrive
while values are summed, and the other way round. How copies are made is in :mod:`.copies`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.gluon.copies import BulkCopies, Copies, LaneCopies
from kvquant_compile.lowering.gluon.memory import Memory
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.writer import KernelWriter


@dataclass(frozen=True)
class RingEmitter:
    """Writes which page comes next; ``here`` is where a warp's page lies."""

    spec: GluonSpec
    memory: Memory

    def start(self, out: KernelWriter) -> None:
        """A warp's first page, whose number is asked for before anything else is known."""
        warps = self.spec.warps
        out(f"turn = gl.maximum(split, 0) * {warps} + warp", f"stride = splits * {warps}")
        self.find(out, "turn")

    @property
    def copies(self) -> Copies:
        """How bytes get into shared memory."""
        way = BulkCopies if self.spec.bulk else LaneCopies
        return way(self.spec, self.memory)

    def prologue(self, out: KernelWriter) -> None:
        """The head's constants, and the first page of every warp."""
        out("", "# this warp's page")
        self.locate(out)
        self.copies.start(out, "keys", "turn < units")
        self.copies.start(out, "values", "turn < units")
        if self.spec.dynamic:
            out(
                "drawn = counters.to(gl.int64) + (gl.program_id(0) * tiles + tile) * 1024",
                "asked = turn * 0",
            )
            self.draw(out, "units")

    def draw(self, out: KernelWriter, wanted: str) -> None:
        """Ask for a page; the answer is awaited by :meth:`advance`."""
        if self.spec.dynamic:
            out.ptx(
                ".reg .pred p; .reg .b32 l; mov.u32 l, %laneid; setp.eq.u32 p, l, 0;"
                " setp.ne.and.u32 p, $2, 0, p;"
                " mov.u32 $0, $3; @p atom.global.relaxed.gpu.add.u32 $0, [$1], 1;",
                ["asked"], ["drawn", wanted, "asked"], kinds="lrr", name="DRAW",
            )  # fmt: skip

    def advance(self, out: KernelWriter) -> None:
        """``upcoming``, the page after this one; the same one where it is read again."""
        if self.spec.dynamic:
            text = "shfl.sync.idx.b32 $0, $1, 0, 31, -1;"
            out.ptx(text, ["upcoming"], ["asked"], name="FIRST_LANE")
            out("upcoming += stride")
        else:
            out("upcoming = turn + stride")

    def find(self, out: KernelWriter, unit: str) -> None:
        """Start loading the page number of a unit."""
        out(
            f"page_ahead = gl.minimum(first_page + {unit}, pages - 1)",
            "identity = gl.load(table + row * table_row + page_ahead)",
        )

    def locate(self, out: KernelWriter) -> None:
        """Byte addresses of the page and of its positions."""
        with out.block("if ONE_SLAB:"):  # then the addresses are the slab itself
            out(
                "page_source = addresses.to(gl.int64)"
                " + identity.to(gl.int64) * (heads * page_bytes)"
            )
        with out.block("else:"):
            out("page_source = gl.load(addresses + identity)")
        out(
            "page_source += head * page_bytes",
            "position_source = (positions + row * position_row).to(gl.int64)"
            f" + page_ahead.to(gl.int64) * {4 * PAGE_TOKENS}",
        )
