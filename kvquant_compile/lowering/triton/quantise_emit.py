"""Pieces of generated quantiser source that keys and values share.

A variable holds all channels of a program's tokens, ``[T, W]`` with W the next power of two;
error feedback takes sixteen channels at a time, in a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvquant_compile.codec.feedback import STAGE_CHANNELS
from kvquant_compile.codec.layout import padded
from kvquant_compile.lowering.triton.append_word import load_words, store_words
from kvquant_compile.lowering.triton.emit import CodeWords, Source
from kvquant_compile.lowering.triton.quantise_single import LANES, feed_back, load_feedback

COUNTED_BITS = 4
PLACES = (
    "INDEX: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, FUSED: tl.constexpr,"
    " NATIVE: tl.constexpr"
)
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
        shared: whether other programs may change other bits of the same words.
    """

    name: str
    bits: int
    dim: int
    source_dim: int
    slots: int
    feedback: bool
    tokens: int
    shared: bool

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
        every = f"tl.arange(0, {self.width})"
        if self.tokens == 1:  # Four neighbours would be loaded at once, and end up in one lane.
            return f"c = opaque({every}, NATIVE)[None, :]"
        return f"c = {every}[None, :] + tl.zeros([{self.tokens}, 1], tl.int32)"

    def constant(self, index: int) -> str:
        """A channel constant: loaded where it is needed or, of one token, before anything else."""
        return f"constant{index}" if self.tokens == 1 else self._load_constant(index)

    def load_early(self, out: Source, constants: int) -> None:
        """What a program of one token loads before anything else, then its page's number."""
        if self.tokens > 1:
            return
        out(*(f"constant{i} = {self._load_constant(i)}" for i in range(constants)))
        if self.feedback:
            load_feedback(out, self.stages, self.width // LANES)
        out("one = tl.arange(0, 1)", "used, first = slot + one >= 0, slot % 64")
        out("identity = tl.load(table_at + one, mask=used, other=0)")

    def load_address(self, out: Source) -> None:
        """The page's address, where a program of one token has computed for a while."""
        if self.tokens == 1:
            out("page_byte = tl.load(addresses + identity, mask=used, other=0) + head_bytes")

    def load_words(self, out: Source) -> None:
        """The words to be changed, where a program of one token knows its page's address."""
        if self.tokens == 1:
            load_words(out, self._words, "page_byte.to(tl.pointer_type(tl.int32)) + WORDS")

    @property
    def _words(self) -> CodeWords:
        return CodeWords(self.name, 0, self.bits, padded(self.dim) // 8)

    def _load_constant(self, index: int) -> str:
        return f"tl.load(channels + {index * self.width} + c)"

    @property
    def arguments(self) -> str:
        """Of the quantiser's function: where a page and its codes are, and constants."""
        where = "codes, page_byte, token"
        if self.tokens == 1:
            where = "slot, table_at, addresses, head_bytes, token, WORDS: tl.constexpr"
        return f"{where}, {PLACES}"

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
                    out(f"return {_nearest(0, count)}")
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
        if self.tokens == 1:
            self._encode_one(out, index)
        elif self.feedback:
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
            out("moved = tl.dot(missed.to(tl.float16), tile, moved)")

    def _encode_one(self, out: Source, index: Sequence[str]) -> None:
        """``codes`` of the only token as bytes; ``level`` becomes the levels chosen."""
        wanted = "x"
        if self.feedback:
            feed_back(out, self.stages, self.width // LANES, index, self.level("near"))
            wanted = "wanted"
        if index:
            out(f"level = {self.level(wanted)}")
        out(f"codes = code_bytes({self._known('c', self.code(wanted))}, {self.width // LANES})")
        store_words(out, self._words, self.shared)


def _nearest(first: int, last: int) -> str:
    """Expression of the nearest of the levels ``first .. last - 1``, by halves."""
    if last - first == 1:
        return f"l{first}"
    middle = (first + last) // 2
    return f"tl.where(x >= m{middle}, {_nearest(middle, last)}, {_nearest(first, middle)})"


def channel_width(dim: int) -> int:
    """Channels of a variable that holds ``dim``: a power of two, at least one a lane."""
    return max(LANES, 1 << (dim - 1).bit_length())
