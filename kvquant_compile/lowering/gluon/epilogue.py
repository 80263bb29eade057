"""The end of a program: its warps' sums become one, and the last program merges all splits."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.gluon.fragments import ALL_LANES, program_sync, reduce_lanes
from kvquant_compile.lowering.gluon.memory import Memory
from kvquant_compile.lowering.gluon.own import write_column
from kvquant_compile.lowering.gluon.spec import COLUMN_GROUP, GluonSpec
from kvquant_compile.lowering.gluon.values import LOG2_ONE
from kvquant_compile.lowering.gluon.visibility import HIDDEN, NOTHING
from kvquant_compile.lowering.gluon.writer import KernelWriter, approximate, listed, registers

BATCH = 24
"""Splits whose partial results are loaded together: at most a warp's lanes."""


@dataclass(frozen=True)
class EpilogueEmitter:
    """Writes partial results [columns, value_dim] and log2-sum-exps [columns] of a split."""

    spec: GluonSpec
    memory: Memory

    @property
    def _vectors(self) -> int:
        """Groups of four sums of a lane."""
        return self.spec.value_groups * self.spec.groups

    def merge_warps(self, out: KernelWriter) -> None:
        """One result of all warps, through the pages' memory, which nothing reads any more."""
        out("", "# merge the warps")
        turns = range(-(-self._vectors // self.spec.warps))
        for turn in turns:
            self._load_transform(out, turn)
        self._store(out)
        program_sync(out)
        out(
            "base_row = ((gl.program_id(0) * tiles + tile) * (splits + 1) + split)"
            f" * {self.spec.columns}"
        )
        for turn in turns:
            self._merge(out, turn)

    def _store(self, out: KernelWriter) -> None:
        for group in range(self.spec.groups):
            for name in (f"mass{group}", f"flat{group}"):
                reduce_lanes(out, name, "{} + {}")
            for q in range(self.spec.value_groups):
                at = 512 * (group * self.spec.value_groups + q)
                sums = [f"sum{group}_{4 * q + i}" for i in range(4)]
                self._store16(out, f"here + lane * 16 + {at}", sums)
            state = [f"{name}{group}" for name in ("peak", "mass", "flat", "excess")]
            self._store16(out, f"here + t * 16 + {512 * self._vectors + 64 * group}", state)

    def _store16(self, out: KernelWriter, address: str, values: list[str]) -> None:
        text = "st.shared.v4.f32 [$1], {$2, $3, $4, $5};"
        out.ptx(text, ["_"], [address, *values], kinds="rffff", name="STORE_SUMS")

    def _load16(self, out: KernelWriter, names: list[str], address: str) -> None:
        text = f"ld.shared.v4.f32 {listed(registers(0, 4))}, [$4];"
        out.ptx(text, names, [address], into="ffff", name="LOAD_SUMS")

    def _write_vector(self, out: KernelWriter, turn: int) -> None:
        """The warp's vector of four channels, and where it lies."""
        groups, last = self.spec.value_groups, self._vectors - 1
        out(
            f"mine = (tid >> 5) + {turn * self.spec.warps}",
            f"vector = gl.minimum(mine, {last})",
            f"group = vector // {groups}",
            f"channel = g * {self.spec.layout.value_dim // 8} + (vector % {groups}) * 4",
        )

    def _load_transform(self, out: KernelWriter, turn: int) -> None:
        """The channels' gains and offsets, asked for before the warps meet."""
        self._write_vector(out, turn)
        out(f"at = head * {self.spec.layout.value_dim} + channel")
        for name in ("gain", "offset"):
            out(*(f"{name}{turn}_{i} = gl.load({name} + at + {i})" for i in range(4)))

    def _merge(self, out: KernelWriter, turn: int) -> None:
        """A warp merges one vector of sums of all warps."""
        groups, last = self.spec.value_groups, self._vectors - 1
        warps = range(self.spec.warps)
        lane = "" if self.spec.span == 1 else f" & (t % {self.spec.span} == 0)"  # all hold the same
        self._write_vector(out, turn)
        out(f"column = (group * {COLUMN_GROUP} + t) >> {self.spec.span // 2}")
        for w in warps:
            at = f"shared + {w * self.memory.stage}"
            state = f"{at + f' + {512 * self._vectors}'} + group * 64 + t * 16"
            self._load16(out, [f"{name}_{w}" for name in ("peak", "mass", "flat", "excess")], state)
        out("top = peak_0", *(f"top = gl.maximum(top, peak_{w})" for w in warps if w))
        out("whole = zero", "even = zero", *(f"r{i} = zero" for i in range(4)))
        for w in warps:
            approximate(out, "ex2", "part", f"peak_{w} - top")
            address = f"shared + {w * self.memory.stage} + vector * 512 + lane * 16"
            self._load16(out, [f"a{i}" for i in range(4)], address)
            out(f"whole += mass_{w} * part", f"even += flat_{w} * part")
            out(*(f"r{i} += (a{i} - excess_{w}) * part" for i in range(4)))
        out(
            f"seen = top > {NOTHING}",
            "over = gl.where(seen, 1.0 / whole, 0.0)",
            f"target = (base_row + column).to(gl.int64) * {self.spec.layout.value_dim} + channel",
            f"writes = (mine <= {last}){lane}",
        )
        for i in range(4):
            out(
                f"result = (r{i} + even) * over * gain{turn}_{i} + offset{turn}_{i}",
                "result = gl.where(seen, result, 0.0)  # nothing of garbage survives",
                f"gl.store(partial + target + {i}, result, mask=writes)",
            )
        approximate(out, "lg2", "whole", "whole")
        out(
            f"sum_log = gl.where(seen, top + whole - {LOG2_ONE}, float('-inf'))",
            f"writes &= (g == 0) & (vector % {groups} == 0)",
            "gl.store(partial_lse + base_row + column, sum_log, mask=writes)",
        )

    def merge_splits(self, out: KernelWriter) -> None:
        """The last program of a head and tile merges, and leaves the counters at zero."""
        program_sync(out)
        out(
            "", "# the last program merges the splits",
            "done = counters + (gl.program_id(0) * tiles + tile) * 256 + 128",
            "before = gl.atomic_add(done, 1, sem='acq_rel', scope='gpu')",
        )  # fmt: skip
        with out.block("if before == splits:"):
            for number in range(-(-self.spec.columns // self.spec.warps)):
                self._column(out, number)
            out("gl.store(done, 0)", "gl.store(done - 128, 0)")
        out(
            "# never true: keeps the shared memory alive to the end",
            "gl.store(counters + tid, own_row.load(LANES), mask=tid < (splits >> 31))",
        )

    @property
    def _vectors_of_lane(self) -> range:
        """A lane takes four neighbouring channels, and every 128th of these."""
        return range(-(-self.spec.layout.value_dim // 128))

    @property
    def _sums(self) -> list[str]:
        return [f"r{k}_{i}" for k in self._vectors_of_lane for i in range(4)]

    def _column(self, out: KernelWriter, number: int) -> None:
        """One query: partial results weighted by their log-sum-exps, and a learned sink."""
        columns, dim = self.spec.columns, self.spec.layout.value_dim
        write_column(out, self.spec, number)
        out(
            "split_rows = (gl.program_id(0) * tiles + tile) * (splits + 1)",
            f"own_place = gl.minimum(own_place, {columns - 1})",
            f"top = zero + {HIDDEN}", "whole = zero",
        )  # fmt: skip
        out(*(f"{name} = zero" for name in self._sums))
        with out.block(f"for start in range(0, splits + 1, {BATCH}):"):
            self._load_batch(out, columns, dim)
            reduce_lanes(out, "high", "gl.maximum({}, {})", lanes=ALL_LANES)
            out("grown = gl.maximum(top, high)")
            approximate(out, "ex2", "decay", "top - grown")
            approximate(out, "ex2", "weight", "log - grown")
            out("top = grown", "whole = whole * decay + weight")
            out(*(f"{name} = {name} * decay" for name in self._sums))
            for k in range(BATCH):
                text = f"shfl.sync.idx.b32 $0, $1, {k}, 31, -1;"
                out.ptx(text, ["share"], ["weight"], kinds="f", into="f", name="FROM_LANE")
                for v in self._vectors_of_lane:
                    out(*(f"r{v}_{i} += a{k}_{v}_{i} * share" for i in range(4)))
        reduce_lanes(out, "whole", "{} + {}", lanes=ALL_LANES)
        self._sink_logit(out)
        self._store_result(out, dim)

    def _load_batch(self, out: KernelWriter, columns: int, dim: int) -> None:
        """A batch of splits, one log-sum-exp a lane; loads first, to wait for them only once.

        Splits beyond the last weigh nothing, but must not be read: they could hold anything.
        """
        for k in range(BATCH):
            out(
                f"number = gl.minimum(start + {k}, splits)",
                f"source = partial + ((split_rows + number) * {columns} + own_place).to(gl.int64)"
                f" * {dim}",
            )
            for v in self._vectors_of_lane:
                text = f"ld.global.cg.v4.f32 {listed(registers(0, 4))}, [$4];"
                at = f"(source + gl.minimum(lane * 4 + {128 * v}, {dim - 4})).to(gl.int64)"
                names = [f"a{k}_{v}_{i}" for i in range(4)]
                out.ptx(text, names, [at], kinds="l", into="ffff", name="LOAD_PARTIAL")
        out(
            f"there = (lane < {BATCH}) & (start + lane <= splits)",
            f"log = gl.load(partial_lse + (split_rows + start + lane) * {columns} + own_place,"
            " mask=there, other=float('-inf'), cache_modifier='.cg')",
            "high = log",
        )

    def _sink_logit(self, out: KernelWriter) -> None:
        with out.block("if LOGITS:"):
            out(
                "logit = gl.load(sink_logits + query_head).to(gl.float32) * 1.4426950408889634",
                "grown = gl.maximum(top, logit)",
            )
            approximate(out, "ex2", "decay", "top - grown")
            approximate(out, "ex2", "weight", "logit - grown + zero")
            out("top = grown", "whole = whole * decay + weight")
            out(*(f"{name} = {name} * decay" for name in self._sums))

    def _store_result(self, out: KernelWriter, dim: int) -> None:
        """Output [B, S, Hq, value_dim], natural log-sum-exps [B, Hq, S]."""
        out(
            f"seen = top > {NOTHING}",
            "over = gl.where(seen, 1.0 / whole, 0.0)",
            "place = (row * steps + own_step) * (heads * rep) + query_head",
            f"destination = output + place.to(gl.int64) * {dim}",
        )
        for v in self._vectors_of_lane:
            out(f"first_channel = lane * 4 + {128 * v}")
            for i in range(4):
                out(
                    f"gl.store(destination + first_channel + {i}, (r{v}_{i} * over)"
                    f".to(output.dtype.element_ty), mask=own_real & (first_channel < {dim}))"
                )
        approximate(out, "lg2", "whole", "whole")
        out(
            "natural = gl.where(seen, (top + whole) * 0.6931471805599453, float('-inf'))",
            "gl.store(output_lse + (row * (heads * rep) + query_head) * steps + own_step + lane,"
            " natural, mask=(lane == 0) & own_real)",
        )
