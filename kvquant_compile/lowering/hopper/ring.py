"""Pages on their way: bulk copies, the order of pages, and page addresses.

Every warp has room for one page. Its keys and its values are copied apart, each refilled as soon
as it has been read: the next keys arrive while values are summed, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.hopper.spec import Constants, HopperSpec, Memory
from kvquant_compile.lowering.hopper.writer import KernelWriter

_COPY = (
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    " [$1+{to}], [{source}+{offset}], {size}, [$2];\n"
)


@dataclass(frozen=True)
class RingEmitter:
    """Writes copies and waits; ``here`` is a warp's page, ``arrival`` its barriers."""

    spec: HopperSpec
    memory: Memory

    def start(self, out: KernelWriter) -> None:
        """A warp's first page, whose number is asked for before anything else is known."""
        warps = self.spec.warps
        out(f"turn = gl.maximum(split, 0) * {warps} + warp", f"stride = splits * {warps}")
        self.find(out, "turn")

    def prologue(self, out: KernelWriter) -> None:
        """Barriers, the head's constants, and the first page of every warp."""
        m, warps = self.memory, self.spec.warps
        out(
            "", "# this warp's page, its barriers, and the barrier of the head's constants",
            f"here = shared + warp * {m.stage}",
            f"arrival = shared + {m.barriers} + warp * 16",
            f"ready = shared + {m.barriers + 16 * warps}",
        )  # fmt: skip
        out.ptx(
            ".reg .pred p; .reg .b32 l; mov.u32 l, %laneid; setp.eq.u32 p, l, 0;\n"
            "@p mbarrier.init.shared::cta.b64 [$1], 1;\n"
            "@p mbarrier.init.shared::cta.b64 [$1+8], 1;\n"
            "setp.eq.and.u32 p, $3, 0, p;\n"
            "@p mbarrier.init.shared::cta.b64 [$2], 1;\n"
            "fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;"
            " bar.warp.sync -1;",
            ["_"], ["arrival + lz", "ready + lz", "warp + lz"], name="BARRIERS",
        )  # fmt: skip
        size = Constants(self.spec).size
        out.ptx(
            ".reg .pred p; setp.eq.u32 p, $4, 0;\n"
            f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], {size};\n"
            "@p " + _COPY.format(to=0, source="$3", offset=0, size=size),
            ["_"],
            [
                f"shared + {self.memory.constants} + lz", "ready + lz",
                f"constants.to(gl.int64) + head.to(gl.int64) * {size} + lz", "tid",
            ],
            kinds="rrlr", name="COPY_CONSTANTS",
        )  # fmt: skip
        self.locate(out)
        self.copy_keys(out, "turn < units")
        self.copy_values(out, "turn < units")
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

    def copy_keys(self, out: KernelWriter, wanted: str) -> None:
        """Copy the located page's keys and positions."""
        m = self.memory
        parts = [(0, "$3", 0, m.key_bytes), (m.positions, "$4", 0, 4 * PAGE_TOKENS)]
        self._copy(out, "arrival", parts, wanted, "COPY_KEYS")

    def copy_values(self, out: KernelWriter, wanted: str) -> None:
        """Copy the located page's values."""
        m = self.memory
        size = self.spec.layout.page_bytes - m.key_bytes
        parts = [(m.key_bytes, "$3", m.key_bytes, size)]
        self._copy(out, "arrival + 8", parts, wanted, "COPY_VALUES")

    def _copy(
        self,
        out: KernelWriter,
        barrier: str,
        parts: list[tuple[int, str, int, int]],
        wanted: str,
        name: str,
    ) -> None:
        # One elected lane: with a predicate on the lane number ptxas would emit a loop.
        text = (
            ".reg .pred p, q; bar.warp.sync -1; setp.eq.u32 q, $5, 0; @q bra SKIP;\n"
            "elect.sync _|p, -1; @!p bra SKIP;\n"
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], "
            f"{sum(part[3] for part in parts)};\n"
        )
        for to, source, offset, size in parts:
            text += _COPY.format(to=to, source=source, offset=offset, size=size)
        text += "SKIP:"
        addresses = ["here + lz", f"{barrier} + lz", "page_source + lz", "position_source + lz"]
        wanted = f"({wanted}).to(gl.int32) + lz"
        out.ptx(text, ["_"], [*addresses, wanted], kinds="rrllr", name=name)

    def wait(self, out: KernelWriter, barrier: str, parity: str) -> None:
        """Wait until the copies of a barrier's current phase have arrived."""
        out.ptx(
            ".reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2;"
            " @!p bra AGAIN;",
            ["_"], [f"{barrier} + lz", f"{parity} + lz"], name="WAIT",
        )  # fmt: skip
