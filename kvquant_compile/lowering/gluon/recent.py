"""The exact last tokens of a sequence, which lie in a ring beside the pages.

The programs that read pages leave out what the ring holds; the first program of a head adds it to
the exact leading tokens and the step's own. A warp takes a query at a time, a lane every 32nd
channel, and some tokens at once, so that it waits for memory once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.gluon.fragments import ALL_LANES, reduce_lanes
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.visibility import HIDDEN
from kvquant_compile.lowering.gluon.writer import KernelWriter, approximate

NARROW, WIDE = 8, 4
"""Tokens whose loads are under way together, of up to 128 channels and of more."""


@dataclass(frozen=True)
class RecentEmitter:
    """Adds the ring's tokens to ``own_top``, ``own_mass`` and ``own_sum0 ..`` of a query."""

    spec: GluonSpec

    def write(self, out: KernelWriter) -> None:
        """All tokens from ``held``, the first in the ring, up to the ``stored`` ones."""
        if not self.spec.layout.ring:
            return
        width = 2 * self.spec.pairs + self.spec.layout.value_dim
        out(
            f"ring = sinks + (row * heads + head).to(gl.int64) * ({self.spec.exact_rows} * {width})"
            f" + SINKS * {width}",
            "place = positions + row * position_row",
        )
        for i in self._pair_groups:
            self._load_query(out, i)
        with out.block(
            f"for begin in range(gl.maximum(held, SINKS), stored, {len(self._tokens)}):"
        ):
            for u in self._tokens:
                self._load_token(out, u, width)
            for u in self._tokens:
                self._score(out, u)
            self._absorb(out)

    @property
    def _tokens(self) -> range:
        """Tokens that are read together."""
        widest = max(2 * self.spec.pairs, self.spec.layout.value_dim)
        return range(NARROW if widest <= 128 else WIDE)

    @property
    def _pair_groups(self) -> range:
        return range(-(-self.spec.pairs // 32))

    @property
    def _value_channels(self) -> range:
        return range(self.spec.layout.value_dim // 32)

    def _load_query(self, out: KernelWriter, i: int) -> None:
        """``qa{i}``, ``qb{i}`` of the lane's pair, and what turns it."""
        pairs, dim = self.spec.pairs, self.spec.layout.key_dim
        out(f"pair{i} = lane + {32 * i}", f"known{i} = pair{i} < {pairs}")
        for member, offset in (("a", 0), ("b", pairs)):
            out(f"channel = pair{i} + {offset}")
            mask = f"known{i}"
            if self.spec.reorder:
                out(f"channel = gl.load(query_order + channel, mask={mask}, other={dim})")
                mask += f" & (channel < {dim})"
            load = f"gl.load(own_query + channel, mask={mask}, other=0.0)"
            out(f"q{member}{i} = {load}.to(gl.float32)")
        if self.spec.rotates:
            for word, name in enumerate(("high", "low")):
                load = f"gl.load(turns + 2 * pair{i} + {word}, mask=known{i}, other=0)"
                out(f"{name}{i} = {load}")
        if self.spec.stretched:
            out(f"stretch{i} = gl.load(rope_scale + pair{i}, mask=known{i}, other=1.0)")

    def _load_token(self, out: KernelWriter, u: int, width: int) -> None:
        """Position, key and value of a token; of the last one again where there are no more."""
        out(
            f"token{u} = gl.minimum(begin + {u}, stored - 1)",
            f"at{u} = gl.load(place + token{u})",
            f"live{u} = (begin + {u} < stored) & (token{u} <= slot) & (at{u} >= 0)",
            f"exact = ring + token{u} % {self.spec.layout.ring} * {width}",
        )
        if self.spec.window:
            out(f"live{u} = live{u} & (token{u} > slot - window)")
        for i in self._pair_groups:
            for member, offset in (("a", 0), ("b", self.spec.pairs)):
                load = f"gl.load(exact + {offset} + pair{i}, mask=known{i}, other=0.0)"
                out(f"k{member}{u}_{i} = {load}.to(gl.float32)")
        for i in self._value_channels:
            load = f"gl.load(exact + {2 * self.spec.pairs + 32 * i} + lane)"
            out(f"v{u}_{i} = {load}.to(gl.float32)")

    def _score(self, out: KernelWriter, u: int) -> None:
        """``score{u}``, in units of log 2, of the token turned to its position."""
        out(f"score{u} = zero")
        for i in self._pair_groups:
            a, b = f"ka{u}_{i}", f"kb{u}_{i}"
            if self.spec.rotates:
                text = (
                    ".reg .b32 x; .reg .f32 e; mul.hi.s32 x, $2, $4; mad.lo.s32 x, $2, $3, x;\n"
                    "cvt.rn.f32.s32 e, x; mul.rn.f32 e, e, 0f30C90FDB;\n"
                    "cos.approx.ftz.f32 $0, e; sin.approx.ftz.f32 $1, e;"
                )
                angle = [f"at{u} + lz", f"high{i}", f"low{i}"]
                out.ptx(text, ["cos", "sin"], angle, into="ff", pure=True, name="TURN")
                if self.spec.stretched:
                    out(f"cos = cos * stretch{i}", f"sin = sin * stretch{i}")
                out(f"turned = {a} * cos - {b} * sin", f"{b} = {a} * sin + {b} * cos")
                a = "turned"
            out(f"score{u} += {a} * qa{i} + {b} * qb{i}")
        reduce_lanes(out, f"score{u}", "{} + {}", lanes=ALL_LANES)
        out(f"score{u} = score{u} * scale")
        if self.spec.softcap:
            approximate(out, "ex2", "e", f"score{u} / softcap * 2.885390081777927")
            approximate(out, "rcp", "e", "e + 1.0")
            out(f"score{u} = softcap * (1.0 - 2.0 * e)")
        out(f"score{u} = gl.where(live{u}, score{u} * 1.4426950408889634, {HIDDEN})")

    def _absorb(self, out: KernelWriter) -> None:
        """Add the tokens to the running softmax."""
        every = self._tokens
        out("grown = own_top", *(f"grown = gl.maximum(grown, score{u})" for u in every))
        approximate(out, "ex2", "decay", "own_top - grown")
        out("own_top = grown", "own_mass = own_mass * decay")
        for u in every:
            approximate(out, "ex2", f"weight{u}", f"score{u} - grown")
            out(f"weight{u} = gl.where(live{u}, weight{u}, 0.0)", f"own_mass += weight{u}")
        for i in self._value_channels:
            added = " + ".join(f"weight{u} * v{u}_{i}" for u in every)
            out(f"own_sum{i} = own_sum{i} * decay + {added}")
