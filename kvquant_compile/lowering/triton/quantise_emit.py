"""Pieces of generated quantiser source that keys and values share.

A variable holds all channels of a program's tokens, ``[T, W]`` with W the next power of two;
error feedback takes sixteen channels at a time, in a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvquant_compile.codec.feedback import STAGE_CHANNELS
from kvquant_compile.lowering.triton.emit import Source

COUNTED_BITS = 4
PLACES = "INDEX: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, FUSED: tl.constexpr"
_SORTING = {
    2: [(0, 1)],
    3: [(0, 1), (1, 2), (0, 1)],
    4: [(0, 1), (2, 3), (0, 2), (1, 3), (1, 2)],
}


@dataclass(frozen=True)
class Half:
    """What the generated quantiser of keys or of values depends on.

    Attributes:
        name: "key" or "value".
        bits: of a code.
        dim: channels; keys with their padding.
        source_dim: channels of the model's tensor.
        slots: exact outliers of a token.
        feedback: whether coding errors move later channels.
        tokens: of a program: 1, or 16.
    """

    name: str
    bits: int
    dim: int
    source_dim: int
    slots: int
    feedback: bool
    tokens: int

    @property
    def stages(self) -> int:
        """Stages of error feedback, the last one perhaps partly filled."""
        return -(-self.dim // STAGE_CHANNELS)

    @property
    def width(self) -> int:
        """Channels of a variable."""
        return channel_width(self.dim)

    def column(self) -> str:
        """Channels in a variable's full shape: what is loaded in another shape changes lanes."""
        return f"c = tl.arange(0, {self.width})[None, :] + tl.zeros([{self.tokens}, 1], tl.int32)"

    def constant(self, index: int) -> str:
        """Load of a channel constant."""
        return f"tl.load(channels + {index * self.width} + c)"

    def level(self, x: str) -> str:
        """Expression of the nearest level."""
        return f"{self.name}_level({x}, {self._table()})"

    def code(self, x: str) -> str:
        """Expression of the nearest level's code, uint8."""
        return f"{self.name}_code({x}, {self._table()}).to(tl.uint8)"

    def _table(self) -> str:
        if self.bits > COUNTED_BITS:
            return "levels"
        count = 2**self.bits
        return ", ".join([*(f"m{i}" for i in range(1, count)), *(f"l{i}" for i in range(count))])

    def define_nearest(self, out: Source) -> None:
        """The functions behind :meth:`level` and :meth:`code`; a tie goes to the upper level."""
        count = 2**self.bits
        for kind, first, dtype in (("level", 512, "tl.float32"), ("code", 0, "tl.int32")):
            out("@triton.jit")
            with out.block(f"def {self.name}_{kind}(x, {self._table()}):"):
                if self.bits > COUNTED_BITS:
                    out(f"return tl.load(levels + {first} + cell(x)).to({dtype})")
                elif kind == "level":
                    out("level = tl.where(x >= m1, l1, l0)")
                    out(*(f"level = tl.where(x >= m{i}, l{i}, level)" for i in range(2, count)))
                    out("return level")
                else:
                    out("code = (x >= m1).to(tl.int32)")
                    out(*(f"code += (x >= m{i}).to(tl.int32)" for i in range(2, count)))
                    out("return code")
            out("", "")

    def load_levels(self, out: Source) -> None:
        """The head's table, as scalars up to 4 bits."""
        count = 2**self.bits
        if self.bits > COUNTED_BITS:
            out("levels += head * 1024")
            return
        out(f"levels += head * {2 * count}")
        out(*(f"m{i} = tl.load(levels + {i})" for i in range(1, count)))
        out(*(f"l{i} = tl.load(levels + {count + i})" for i in range(count)))

    def largest(self, out: Source, score: str, prefix: str) -> list[str]:
        """Channels [T, 1] of the largest scores, one for each slot, in no order."""
        names = [f"{prefix}{i}" for i in range(self.slots)]
        if names:
            known = self.dim == self.width
            bits = f"score_bits({score})"
            out(f"bits = {bits}" if known else f"bits = tl.where(c < {self.dim}, {bits}, -1)")
        for i, name in enumerate(names):
            if i:
                out(f"bits = tl.where(c == {names[i - 1]}, -1, bits)")
            out(f"{name} = first_of(bits, tl.max(bits, 1)[:, None], c)")
        return names

    def sort(self, out: Source, names: Sequence[str]) -> None:
        """Bring the slots' channels into ascending order."""
        for i, j in _SORTING.get(len(names), []):
            a, b = names[i], names[j]
            out(f"{a}, {b} = ordered_pair({a}, {b})")

    def encode(self, out: Source, index: Sequence[str], dense: str) -> None:
        """Codes of ``x`` into ``codes``, then slots.

        Args:
            out: the source.
            index: the slots' channels [T, 1].
            dense: expression of what is left of a token, given ``level``.
        """
        if self.feedback:
            self._stages(out, index)
        else:
            out(f"tl.store(codes + c, {self._known('c', self.code('x'))})")
            if index:
                out(f"level = {self.level('x')}")
        if index:
            out(f"rest = ({dense}).to(tl.int32, bitcast=True)")
        for i, name in enumerate(index):
            picked = f"picked(tl.where(c == {name}, rest, 0))"
            out(f"set_slot(page_byte, token, live, {name}, {picked}, {i}, INDEX, RESIDUAL)")

    def _known(self, channel: str, code: str) -> str:
        return code if self.dim % 16 == 0 else f"tl.where({channel} < {self.dim}, {code}, 0)"

    def _stages(self, out: Source, index: Sequence[str]) -> None:
        """Stage by stage; ``level`` becomes the levels chosen. Sums of errors are exact."""
        shape = f"[{self.tokens}, {self.width}]"
        out(f"moved = tl.zeros({shape}, tl.float32)", f"level = tl.zeros({shape}, tl.float32)")
        out("near = tl.arange(0, 16)[None, :]", f"to = tl.arange(0, {self.width})[None, :]")
        out(f"feedback += head * {STAGE_CHANNELS * self.stages * self.width}")
        out(f"feedback_at = feedback + tl.arange(0, 16)[:, None] * {self.width} + to")
        with out.block(f"for s in range({self.stages}):"):
            out(f"tile = tl.load(feedback_at + s * {STAGE_CHANNELS * self.width})")
            out("here = c // 16 == s")
            out("wanted = stage_of(x, here) + stage_of(moved, here)")
            out(f"chosen = {self.level('wanted')}", "channel = 16 * s + near")
            out(f"tl.store(codes + channel, {self._known('channel', self.code('wanted'))})")
            out("missed = on_grid(wanted - chosen)")
            out(*(f"missed = tl.where(channel == {name}, 0.0, missed)" for name in index))
            if index:
                out(f"level = tl.where(here, spread(chosen, {self.width}), level)")
            if self.tokens == 1:
                out("moved += tl.sum(missed.reshape([16, 1]) * tile.to(tl.float32), 0)[None, :]")
            else:
                out("moved = tl.dot(missed.to(tl.float16), tile, moved)")


def channel_width(dim: int) -> int:
    """Channels of a variable that holds ``dim``: a power of two, at least a stage."""
    return max(STAGE_CHANNELS, 1 << (dim - 1).bit_length())
