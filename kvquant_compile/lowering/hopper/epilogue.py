"""The end of a program: its warps' sums become one, normalised, with their log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.hopper.fragments import reduce_lanes
from kvquant_compile.lowering.hopper.spec import COLUMN_GROUP, HopperSpec, Memory
from kvquant_compile.lowering.hopper.values import LOG2_ONE
from kvquant_compile.lowering.hopper.visibility import NOTHING
from kvquant_compile.lowering.hopper.writer import KernelWriter, listed, registers


@dataclass(frozen=True)
class EpilogueEmitter:
    """Writes partial results [columns, value_dim] and log2-sum-exps [columns] of a split."""

    spec: HopperSpec
    memory: Memory

    @property
    def _vectors(self) -> int:
        """Groups of four sums of a lane."""
        return self.spec.value_groups * self.spec.groups

    def write(self, out: KernelWriter) -> None:
        """Merge the warps through the pages' memory, which nothing reads any more."""
        out("", "# merge the warps")
        self._store(out)
        self._barrier(out)
        out(
            "base_row = ((gl.program_id(0) * tiles + tile) * splits + split)"
            f" * {self.spec.columns}"
        )
        for turn in range(-(-self._vectors // self.spec.warps)):
            self._merge(out, turn)
        if self.spec.dynamic:
            self._reset(out)

    def _store(self, out: KernelWriter) -> None:
        for group in range(self.spec.groups):
            for name in (f"mass{group}", f"flat{group}"):
                reduce_lanes(out, name, "{} + {}")
            for q in range(self.spec.value_groups):
                at = 512 * (group * self.spec.value_groups + q)
                sums = [f"sum{group}_{4 * q + i}" for i in range(4)]
                self._store16(out, f"here + lane * 16 + {at}", sums)
            state = [f"peak{group}", f"mass{group}", f"flat{group}", f"mass{group}"]
            self._store16(out, f"here + t * 16 + {512 * self._vectors + 64 * group}", state)

    def _store16(self, out: KernelWriter, address: str, values: list[str]) -> None:
        text = "st.shared.v4.f32 [$1], {$2, $3, $4, $5};"
        out.ptx(text, ["_"], [address, *values], kinds="rffff", name="STORE_SUMS")

    def _barrier(self, out: KernelWriter) -> None:
        out.ptx("bar.sync 0;", ["_"], ["lz"], name="BARRIER")

    def _load16(self, out: KernelWriter, names: list[str], address: str) -> None:
        text = f"ld.shared.v4.f32 {listed(registers(0, 4))}, [$4];"
        out.ptx(text, names, [address], into="ffff", name="LOAD_SUMS")

    def _merge(self, out: KernelWriter, turn: int) -> None:
        """A warp merges one vector of sums of all warps."""
        groups, last = self.spec.value_groups, self._vectors - 1
        warps = range(self.spec.warps)
        out(
            f"mine = (tid >> 5) + {turn * self.spec.warps}",
            f"vector = gl.minimum(mine, {last})",
            f"group = vector // {groups}",
            f"column = group * {COLUMN_GROUP} + t",
        )
        for w in warps:
            at = f"shared + {w * self.memory.stage}"
            state = f"{at + f' + {512 * self._vectors}'} + group * 64 + t * 16"
            self._load16(out, [f"peak_{w}", f"mass_{w}", f"flat_{w}", "rest"], state)
        out("top = peak_0", *(f"top = gl.maximum(top, peak_{w})" for w in warps if w))
        out("whole = zero", "even = zero", *(f"r{i} = zero" for i in range(4)))
        for w in warps:
            text = "ex2.approx.ftz.f32 $0, $1;"
            out.ptx(text, ["part"], [f"peak_{w} - top"], kinds="f", into="f", pure=True, name="EX2")
            address = f"shared + {w * self.memory.stage} + vector * 512 + lane * 16"
            self._load16(out, [f"a{i}" for i in range(4)], address)
            out(f"whole += mass_{w} * part", f"even += flat_{w} * part")
            out(*(f"r{i} += a{i} * part" for i in range(4)))
        out(
            f"seen = top > {NOTHING}",
            "over = gl.where(seen, 1.0 / whole, 0.0)",
            f"channel = g * {self.spec.layout.value_dim // 8} + (vector % {groups}) * 4",
            f"target = (base_row + column).to(gl.int64) * {self.spec.layout.value_dim} + channel",
            f"at = head * {self.spec.layout.value_dim} + channel",
        )
        for i in range(4):
            out(
                f"result = (r{i} + even) * over * gl.load(gain + at + {i})"
                f" + gl.load(offset + at + {i})",
                f"gl.store(partial + target + {i}, result, mask=mine <= {last})",
            )
        text = "lg2.approx.ftz.f32 $0, $1;"
        out.ptx(text, ["whole"], ["whole"], kinds="f", into="f", pure=True, name="LG2")
        out(
            f"sum_log = gl.where(seen, top + whole - {LOG2_ONE}, float('-inf'))",
            f"writes = (mine <= {last}) & (g == 0) & (vector % {groups} == 0)",
            "gl.store(partial_lse + base_row + column, sum_log, mask=writes)",
        )

    def _reset(self, out: KernelWriter) -> None:
        """The last program of a head and tile leaves its counters at zero for the next launch."""
        self._barrier(out)
        out(
            "done = counters + (gl.program_id(0) * tiles + tile) * 256 + 128",
            "before = gl.atomic_add(done, 1, sem='acq_rel', scope='gpu')",
        )
        with out.block("if before == splits - 1:"):
            out("gl.store(done, 0)", "gl.store(done - 128, 0)")
