"""The tokens outside the pages: exact leading ones, exact last ones, and the step's own.

The first program of a head attends to them alone, and leaves the result as one more split. A warp
takes a query at a time, a lane every 32nd channel.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.gluon.fragments import ALL_LANES, reduce_lanes
from kvquant_compile.lowering.gluon.recent import RecentEmitter
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.visibility import HIDDEN, NOTHING
from kvquant_compile.lowering.gluon.writer import KernelWriter, approximate


def write_column(out: KernelWriter, spec: GluonSpec, number: int) -> None:
    """``own_place`` of a column of the tile, ``own_real``, its query head and step."""
    out(
        f"own_place = warp + {number * spec.warps}",
        f"own_column = tile * {spec.columns} + own_place",
        f"own_real = (own_column < rep * steps) & (own_place < {spec.columns})",
        "own_step = own_column % steps",
        "query_head = head * rep + gl.minimum(own_column // steps, rep - 1)",
    )


@dataclass(frozen=True)
class OwnEmitter:
    """Writes split number ``splits`` of the partial results."""

    spec: GluonSpec

    def write(self, out: KernelWriter) -> None:
        """All columns of the tile, a warp at a time."""
        out("", "# exact leading tokens and the step's own")
        with out.block("if split < 0:"):
            for number in range(-(-self.spec.columns // self.spec.warps)):
                self._column(out, number)

    @property
    def _value_channels(self) -> range:
        return range(self.spec.layout.value_dim // 32)

    def _column(self, out: KernelWriter, number: int) -> None:
        write_column(out, self.spec, number)
        out(
            "slot = gl.load(slots + row * slot_row + own_step)",
            "stored = gl.load(history + row)",
            "own_query = query + row.to(gl.int64) * query_batch + query_head * query_head_stride"
            " + own_step * query_step",
            f"own_top = zero + {HIDDEN}", "own_mass = zero",
        )  # fmt: skip
        out(*(f"own_sum{i} = zero" for i in self._value_channels))
        with out.block("if SINKS > 0:"):
            self._sinks(out)
        RecentEmitter(self.spec).write(out)
        with out.block("if EXACT:"), out.block("for n in range(steps):"):
            self._own_token(out)
        out(
            f"seen = own_top > {NOTHING}",
            "over = gl.where(seen, 1.0 / own_mass, 0.0)",
            "extra = (((gl.program_id(0) * tiles + tile) * (splits + 1)) + splits)"
            f" * {self.spec.columns} + own_place",
        )
        for i in self._value_channels:
            at = f"partial + extra.to(gl.int64) * {self.spec.layout.value_dim} + lane + {32 * i}"
            out(f"gl.store({at}, own_sum{i} * over, mask=own_real)")
        approximate(out, "lg2", "own_mass", "own_mass")
        out(
            "own_log = gl.where(seen, own_top + own_mass, float('-inf'))",
            "gl.store(partial_lse + extra + lane, own_log, mask=(lane == 0) & own_real)",
        )

    def _sinks(self, out: KernelWriter) -> None:
        """The exact leading tokens, turned to their positions."""
        pairs, width = self.spec.pairs, 2 * self.spec.pairs + self.spec.layout.value_dim
        with out.block("if not EXACT:"):
            out("stored = gl.maximum(stored, slot + 1)")
        size = f"({self.spec.exact_rows} * {width})"
        out(f"leading = sinks + (row * heads + head).to(gl.int64) * {size}")
        with out.block("for n in range(SINKS):"):
            out(
                "at = gl.load(positions + row * position_row + n)",
                "counts = (n < stored) & (n <= slot) & (at >= 0)",
                f"exact = leading + n * {width}",
                "score = zero",
            )
            for i in range(-(-pairs // 32)):
                out(f"pair = lane + {32 * i}", f"known = pair < {pairs}")
                self._turned(out)
                out("score += gl.where(known, qa * ka + qb * kb, 0.0)")
            values = [f"exact + {2 * pairs + 32 * i} + lane" for i in self._value_channels]
            self._absorb(out, values, "n")

    def _turned(self, out: KernelWriter) -> None:
        """One pair of an exact key, turned (``ka``, ``kb``), and of the query (``qa``, ``qb``)."""
        pairs, dim = self.spec.pairs, self.spec.layout.key_dim
        for member, offset in (("a", 0), ("b", pairs)):
            out(
                f"k{member} = gl.load(exact + {offset} + pair, mask=known, other=0.0)"
                ".to(gl.float32)",
                f"channel = pair + {offset}",
            )
            mask = "known"
            if self.spec.reorder:
                out(f"channel = gl.load(query_order + channel, mask=known, other={dim})")
                mask = f"known & (channel < {dim})"
            out(f"q{member} = gl.load(own_query + channel, mask={mask}, other=0.0).to(gl.float32)")
        if not self.spec.rotates:
            return
        out(
            "high = gl.load(turns + 2 * pair, mask=known, other=0)",
            "low = gl.load(turns + 2 * pair + 1, mask=known, other=0)",
        )
        text = (
            ".reg .b32 x; .reg .f32 e; mul.hi.s32 x, $2, $4; mad.lo.s32 x, $2, $3, x;\n"
            "cvt.rn.f32.s32 e, x; mul.rn.f32 e, e, 0f30C90FDB;\n"
            "cos.approx.ftz.f32 $0, e; sin.approx.ftz.f32 $1, e;"
        )
        out.ptx(text, ["cos", "sin"], ["at + lz", "high", "low"], into="ff", name="CIRCLE")
        if self.spec.stretched:
            out("stretch = gl.load(rope_scale + pair, mask=known, other=1.0)")
            out("cos = cos * stretch", "sin = sin * stretch")
        out("turned = ka * cos - kb * sin", "kb = ka * sin + kb * cos", "ka = turned")

    def _own_token(self, out: KernelWriter) -> None:
        """A token of the step itself, already turned, in the model's channel order."""
        dim = self.spec.layout.key_dim
        out(
            "at = gl.load(slots + row * slot_row + n)",
            "counts = (n <= own_step) & (at >= 0) & (slot >= 0)",
            "own_key = key + row.to(gl.int64) * key_batch + head * key_head + n * key_step",
            "own_value = value + row.to(gl.int64) * value_batch + head * value_head"
            " + n * value_step",
            "score = zero",
        )
        for i in range(-(-dim // 32)):
            at, mask = f"{32 * i} + lane", f"lane < {dim - 32 * i}"
            out(
                f"score += gl.load(own_key + {at}, mask={mask}, other=0.0).to(gl.float32)"
                f" * gl.load(own_query + {at}, mask={mask}, other=0.0).to(gl.float32)"
            )
        values = [f"own_value + {32 * i} + lane" for i in self._value_channels]
        self._absorb(out, values, "at")

    def _absorb(self, out: KernelWriter, values: list[str], slot: str) -> None:
        """Add one token to the running softmax."""
        reduce_lanes(out, "score", "{} + {}", lanes=ALL_LANES)
        out("score = score * scale")
        if self.spec.softcap:
            approximate(out, "ex2", "e", "score / softcap * 2.885390081777927")
            approximate(out, "rcp", "e", "e + 1.0")
            out("score = softcap * (1.0 - 2.0 * e)")
        if self.spec.window:
            out(f"counts = counts & ({slot} > slot - window)")
        out(
            f"score = gl.where(counts, score * 1.4426950408889634, {HIDDEN})",
            "grown = gl.maximum(own_top, score)",
        )
        approximate(out, "ex2", "weight", "score - grown")
        approximate(out, "ex2", "decay", "own_top - grown")
        out("own_top = grown", "weight = gl.where(counts, weight, 0.0)")
        out("own_mass = own_mass * decay + weight")
        for i, pointer in enumerate(values):
            out(f"own_sum{i} = own_sum{i} * decay + weight * gl.load({pointer}).to(gl.float32)")
