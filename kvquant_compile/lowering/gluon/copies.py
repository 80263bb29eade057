"""Asynchronous copies into shared memory, in the two ways that NVIDIA GPUs have.

Every warp has room for one page. Its keys (with the page's positions) and its values are copied
apart; a head's constants are copied once a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.gluon.memory import Constants, Memory
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.writer import KernelWriter

Half = Literal["keys", "values"]


@dataclass(frozen=True)
class Part:
    """Bytes that lie together: where they go in a warp's room, and where they come from.

    ``source`` names the kernel's variable with the address that ``offset`` counts from.
    """

    to: int
    source: Literal["page_source", "position_source"]
    offset: int
    size: int


def parts(memory: Memory, half: Half) -> list[Part]:
    """What one half of a page's copies consists of."""
    split = memory.key_bytes
    if half == "values":
        return [Part(split, "page_source", split, memory.spec.layout.page_bytes - split)]
    tokens = 4 * PAGE_TOKENS
    return [
        Part(0, "page_source", 0, split),
        Part(memory.positions, "position_source", 0, tokens),
    ]


class Copies(Protocol):
    """Writes copies and waits. ``here`` is where a warp's page lies; all lanes of a warp take part.

    Halves of pages are copied in turns: keys, values, keys, ... Whoever starts one must have read
    the bytes that it overwrites; whether it is ``wanted`` is the same for a whole warp.
    """

    def prologue(self, out: KernelWriter) -> None:
        """What comes first, and the copy of the head's constants for programs that read pages."""

    def ready(self, out: KernelWriter) -> None:
        """All warps meet, and the constants are there."""

    def start(self, out: KernelWriter, half: Half, wanted: str) -> None:
        """Copy half of the located page, if ``wanted``."""

    def wait(self, out: KernelWriter, half: Half) -> None:
        """Wait until half of the page is there."""


@dataclass(frozen=True)
class BulkCopies:
    """The copy engine of compute capability 9 and later: one lane asks, an mbarrier counts bytes.

    Takes no instructions but the request, which leaves more for everything else.
    """

    spec: GluonSpec
    memory: Memory

    def prologue(self, out: KernelWriter) -> None:
        """Barriers and constants."""
        m, warps = self.memory, self.spec.warps
        out(
            f"arrival = shared + {m.barriers} + warp * 16",
            f"ready = shared + {m.barriers + 16 * warps}",
        )
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
            "@p " + _bulk(0, "$3", 0, size),
            ["_"],
            [
                f"shared + {m.constants} + lz", "ready + lz",
                f"constants.to(gl.int64) + head.to(gl.int64) * {size} + lz",
                "tid | (split >> 31)",
            ],
            kinds="rrlr", name="COPY_CONSTANTS",
        )  # fmt: skip
        out("phase = lz")

    def ready(self, out: KernelWriter) -> None:
        """The barrier of the program, then the constants' own."""
        out.ptx("bar.sync 0;", ["_"], ["lz"], name="BARRIER")
        self._wait(out, "ready", "lz")

    def start(self, out: KernelWriter, half: Half, wanted: str) -> None:
        """One request of one lane."""
        # One elected lane: with a predicate on the lane number ptxas would emit a loop.
        text = (
            ".reg .pred p, q; bar.warp.sync -1; setp.eq.u32 q, $5, 0; @q bra SKIP;\n"
            "elect.sync _|p, -1; @!p bra SKIP;\n"
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], "
            f"{sum(part.size for part in parts(self.memory, half))};\n"
        )
        operands = {"page_source": "$3", "position_source": "$4"}
        for part in parts(self.memory, half):
            text += _bulk(part.to, operands[part.source], part.offset, part.size)
        text += "SKIP:"
        out.ptx(
            text, ["_"],
            [
                "here + lz", f"{self._barrier(half)} + lz", "page_source + lz",
                "position_source + lz", f"({wanted}).to(gl.int32) + lz",
            ],
            kinds="rrllr", name=f"COPY_{half.upper()}",
        )  # fmt: skip

    def wait(self, out: KernelWriter, half: Half) -> None:
        """Until the barrier's phase is over; its parity changes from page to page."""
        self._wait(out, self._barrier(half), "phase")

    @staticmethod
    def _barrier(half: Half) -> str:
        return "arrival" if half == "keys" else "arrival + 8"

    @staticmethod
    def _wait(out: KernelWriter, barrier: str, parity: str) -> None:
        out.ptx(
            ".reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2;"
            " @!p bra AGAIN;",
            ["_"], [f"{barrier} + lz", f"{parity} + lz"], name="WAIT",
        )  # fmt: skip


@dataclass(frozen=True)
class LaneCopies:
    """Copies of sixteen bytes by every lane, as compute capability 8 has them.

    Each start is one group, empty where nothing is wanted. Halves take turns, so that the half
    waited for is always in the group before the last one.
    """

    spec: GluonSpec
    memory: Memory

    def prologue(self, out: KernelWriter) -> None:
        """Constants, a share of them a thread."""
        size = Constants(self.spec).size
        out("landing = here + lane * 16", "lane_bytes = (lane * 16).to(gl.int64)")
        text = _lane_copies(
            [("$1", "$2", "$3", Part(0, "page_source", 0, size))], 512 * self.spec.warps
        )
        out.ptx(
            ".reg .pred q; setp.lt.s32 q, $4, 0; @q bra SKIP;\n"
            + text + "SKIP: cp.async.commit_group;",
            ["_"],
            [
                f"shared + {self.memory.constants} + tid * 16",
                f"constants.to(gl.int64) + head.to(gl.int64) * {size} + (tid * 16).to(gl.int64)",
                "tid * 16", "split + lz",
            ],
            kinds="rlrr", name="COPY_CONSTANTS",
        )  # fmt: skip

    def ready(self, out: KernelWriter) -> None:
        """Every thread's own constants, older than both halves of the first page; then all."""
        out.ptx("cp.async.wait_group 2; bar.sync 0;", ["_"], ["lz"], name="BARRIER")

    def start(self, out: KernelWriter, half: Half, wanted: str) -> None:
        """A few copies a lane."""
        sources = {"page_source": "$2", "position_source": "$3"}
        copies = [("$1", sources[part.source], "$4", part) for part in parts(self.memory, half)]
        text = (
            ".reg .pred q; bar.warp.sync -1; setp.eq.u32 q, $5, 0; @q bra SKIP;\n"
            + _lane_copies(copies, 512) + "SKIP: cp.async.commit_group;"
        )  # fmt: skip
        out.ptx(
            text, ["_"],
            [
                "landing", "page_source + lane_bytes", "position_source + lane_bytes", "lane * 16",
                f"({wanted}).to(gl.int32) + lz",
            ],
            kinds="rllrr", name=f"COPY_{half.upper()}",
        )  # fmt: skip

    def wait(self, out: KernelWriter, half: Half) -> None:
        """Until every lane's own copies are there; then the warp meets."""
        out.ptx("cp.async.wait_group 1; bar.warp.sync -1;", ["_"], ["lz"], name="WAIT")


def _bulk(to: int, source: str, offset: int, size: int) -> str:
    return (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        f" [$1+{to}], [{source}+{offset}], {size}, [$2];\n"
    )


def _lane_copies(copies: list[tuple[str, str, str, Part]], stride: int) -> str:
    """Copies of 16 bytes, ``stride`` bytes apart, from operands (target, source, own bytes)."""
    text = ".reg .pred p;\n"
    for target, source, own, part in copies:
        whole = part.size // stride * stride
        for at in range(0, part.size, stride):
            guard = ""
            if at == whole:
                text += f"setp.lt.u32 p, {own}, {part.size - whole};\n"
                guard = "@p "
            text += (
                f"{guard}cp.async.cg.shared.global [{target}+{part.to + at}],"
                f" [{source}+{part.offset + at}], 16;\n"
            )
    return text
