"""The half of the generated kernel that turns key codes into scores.

With table bytes u, scales s, zeros z and the token scale a, a key is ``s (a (u - bias) + z)``,
turned by its position. For a page whose middle is at n, and i a token's offset from it, a pair
scores ``(R(-n) q)' R(i) k``. Two rules, by how far a pair turns within half a page:

* *series* (:mod:`kvquant_compile.lowering.series`): nothing happens to the key. Either term is a
  column of the query, scales are in the query, bytes enter as 1024 + u; what that adds, and the
  zeros, is a level a page and column.
* *explicit* (:mod:`kvquant_compile.lowering.turns`): bytes become turned halves by tables that
  contain scales and zeros. A lane's two tokens of a tile are neighbours and share a table: the
  second one meets the other column. Where keys have slots these are added between scaling and
  turning, and all pairs are explicit.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.half_words import BYTES_AS_1024
from kvquant_compile.lowering.triton.emit import CodeWords, Source, load_rows, load_token_pairs
from kvquant_compile.lowering.triton.queries import QueryEmitter
from kvquant_compile.lowering.triton.spec import KernelSpec, table_row
from kvquant_compile.lowering.turns import SMALL


def half2(number: int) -> str:
    """A small whole number as two equal halves in a signed word, as source."""
    import numpy

    bits = int(numpy.float16(number).view(numpy.uint16))
    word = bits << 16 | bits
    return str(word - (1 << 32) if word >= 1 << 31 else word)


@dataclass(frozen=True)
class KeyEmitter:
    """Writes ``score`` [W, 64, Q] of a page in the row order of keys, in units of ``unit``."""

    spec: KernelSpec
    words: CodeWords

    @property
    def _series(self) -> range:
        return range(self.spec.explicit, self.spec.groups)

    def prologue(self, out: Source) -> None:
        """The table's words, and places of rows."""
        out(
            "peak = tl.full([W, Q], float('-inf'), tl.float32)",
            "row64 = tl.arange(0, 64)",
            "row_token = row64 // 32 * 32 + row64 % 8 * 4 + row64 // 16 % 2 * 2 + row64 // 8 % 2",
            "second = (row64 // 8 % 2 == 1)[None, :, None]  # of two neighbours",
            "away = (row_token - 32).to(tl.float32)[None, :, None] / 32  # in half pages",
        )
        if self.spec.layout.spec.key_slots:
            out(f"key_shrink = {SMALL} / tl.load(key_unit + head)")
        table_words(out, "k", "key", self.spec.layout.spec.key_bits)

    def scores(self, out: Source, queries: QueryEmitter) -> None:
        """Unpacks a page's keys and multiplies them with the queries."""
        out("", "# keys")
        self.words.split(out)
        self.words.unpack(out)
        self._tokens(out)
        for group in range(self.spec.explicit):
            queries.group(out, group)
            self._multiply(out, group)
            if self.spec.zero_fragments:
                self._turned_zeros(out, group)
        if self.spec.explicit:
            self._finish_explicit(out)
        for group in self._series:
            queries.group(out, group)
        if self._series:
            self._levels(out)
        for group in self._series:
            self._multiply(out, group)
        self._finish(out)

    def _levels(self, out: Source) -> None:
        """``level`` [W, 8, N] that products of bytes start from, and under token scales
        ``resting``, of zeros: rows of one product are twice the former, or both."""
        for group in self._series:
            start = "both" if group != self._series[0] else "tl.zeros([W, 16, N], tl.float32)"
            for i, member in enumerate("ab"[: len(self.spec.octets_of(group))]):
                at = f"key_words + (head * {self.spec.groups} + {group}) * 384 + {128 * (i + 1)}"
                out(f"words = tl.load({at} + opaque[:, None] + flat4[None, :])")
                rows = "level_rows(words, W, NATIVE)"
                out(f"both = tl.dot({rows}, right_{member}{group}, {start})")
                start = "both"
        out("level, resting = both.reshape([W, 2, 8, N]).permute([0, 2, 3, 1]).split()")

    def _tokens(self, out: Source) -> None:
        """Token scales and slots of a lane's tokens, as doubled halves [W, 32, 4, 2]; where there
        are no slots token scales are for scores, ``factor`` [W, 64]."""
        layout = self.spec.layout
        at = layout.offsets
        if self.spec.scaled:
            first = at["key_token_scale"][0]
            if self.spec.affine:
                load_token_pairs(out, "factor", f"here[:, None] + {first // 4}")
                out("factor = half_rows(factor0, factor1, factor2, factor3, W).to(tl.float32)")
            else:
                out(f"factor = pair_tokens(tl.load(here[:, None] + {first // 4} + lane), g, W)")
        for slot in range(layout.spec.key_slots):
            first = at["key_slot_residual"][0] // 4 + 32 * slot
            index = (at["key_slot_index"][0] + 64 * slot) // 4
            out(
                f"rest = tl.load(here[:, None] + {first} + lane)",
                "rest_low = lower_half(rest).to(tl.float32) * key_shrink",
                "rest_high = upper_half(rest).to(tl.float32) * key_shrink",
                f"residual{slot} = pair_tokens(pack_halves(rest_low, rest_high), g, W)",
                f"byte = key_tokens(tl.load(here[:, None] + {index} + lane % 16), g, W)",
                "whereabouts = (byte - 2 * t[:, :, None, None]).to(tl.float32)",
                f"channel{slot} = pack_halves(whereabouts, whereabouts - 1)",
            )

    def _multiply(self, out: Source, group: int) -> None:
        octets = self.spec.octets_of(group)
        explicit, whole = group < self.spec.explicit, len(octets) == 2
        bits, per_tile = self.words.bits, self.spec.pairs // 8
        high = "0" if explicit else BYTES_AS_1024
        for i, member in enumerate("ab" if whole else "a"):
            index = 2 * group + i
            low, above = self.words.tiles(index, per_tile + index)
            out(
                f"f00, f01, f10, f11 = key_levels({low}, {above},"
                f" kl0, kl1, kl2, kl3, key_table, {high}, {bits}, NATIVE)",
                f"{member}0 = tl.join(f00, f10)",
                f"{member}1 = tl.join(f01, f11)",
            )
        if not whole:  # one slice: column half 0 is member a, half 1 member b
            out("b0 = a1")
        if explicit:
            self._turn(out, group)
        name, first = ("made", 0) if explicit else ("kept", self.spec.explicit)
        start = "tl.zeros([W, 64, N], tl.float32)" if explicit else "every_row(level, W, N)"
        start = name if group != first else start
        if whole:
            out(f"{name} = tl.dot(key_rows(a0, a1, W, NATIVE), right_a{group}, {start})")
            out(f"{name} = tl.dot(key_rows(b0, b1, W, NATIVE), right_b{group}, {name})")
        else:
            out(f"{name} = tl.dot(key_rows(a0, b0, W, NATIVE), right_a{group}, {start})")

    def _turn(self, out: Source, group: int) -> None:
        """Words of bytes to words of turned keys."""
        halves = range(len(self.spec.octets_of(group)))
        if self.spec.affine:
            vectors = [["ca0", "ca1", "sb0", "sb1"], ["sa0", "sa1", "cb0", "cb1"],
                       ["za0", "za1", "zb0", "zb1"]]  # fmt: skip
            at = f"turn_words + head * {4 * self.spec.explicit * 384} + opaque"
            self._load_turns(out, at, group, self.spec.explicit, vectors)
            for k in halves:
                out(
                    f"made_a = fma2(b{k}, sb{k}, za{k}, NATIVE)",
                    f"made_b = fma2(a{k}, sa{k}, zb{k}, NATIVE)",
                    f"a{k}, b{k} = fma2(a{k}, ca{k}, made_a, NATIVE),"
                    f" fma2(b{k}, cb{k}, made_b, NATIVE)",
                )
            return
        out(f"constants = key_words + head * {self.spec.groups * 384} + opaque[:, None]")
        for kind in range(3 if self.spec.scaled else 2):
            out(f"words = tl.load(constants + {(3 * group + kind) * 128} + flat4[None, :])")
            names = [f"c{kind}{m}{k}" for m in "ab" for k in range(2)]
            out(f"{', '.join(names)} = split4(words, [W, 32])")
        for k in halves:
            self._element(out, group, k)
        if not self.spec.turns(group):
            return
        vectors = [["cos0", "cos1", "sin0", "sin1"]]
        self._load_turns(out, "turn_words + opaque", group, -(-self.spec.rotated // 2), vectors)
        for k in halves:
            out(f"a{k}, b{k} = rotate2(a{k}, b{k}, cos{k}, sin{k}, NATIVE)")

    def _load_turns(
        self, out: Source, base: str, group: int, groups: int, vectors: list[list[str]]
    ) -> None:
        """Words of a group's table, [W, 32, 4, 1] by lane and tile."""
        size = 128 * len(vectors)
        out(f"turn_table = ({base})[None, :, None]",
            f"tiles = (four * {groups * size} + {group * size})[:, None, None]")  # fmt: skip
        for i, names in enumerate(vectors):
            pointers = f"turn_table + {128 * i} + tiles + flat4"
            out(
                f"turned = {load_rows(pointers, 128)}.reshape([4, W, 32, 4]).permute([1, 2, 0, 3])",
                f"{', '.join(names)} = split4(turned, [W, 32, 4])",
                *(f"{name} = {name}[:, :, :, None]" for name in names),
            )

    def _element(self, out: Source, group: int, k: int) -> None:
        """Scale, zero, token scale and slots of a word of each member."""
        spec = self.spec.layout.spec
        octet = self.spec.octets_of(group)[k]
        for m in range(2):
            word, wide = f"{'ab'[m]}{k}", "[:, :, None, None]"
            const = f"{'ab'[m]}{k}{wide}"
            out(f"{word} = fma2({word}, c0{const}, c1{const}, NATIVE)")
            if spec.key_token_scale:
                out(f"{word} = fma2({word}, factor, c2{const}, NATIVE)")
            for slot in range(spec.key_slots):
                channel = half2(m * self.spec.pairs + 8 * octet)
                hit = f"equal2(channel{slot}, channel{slot} * 0 + {channel}, NATIVE)"
                out(f"{word} = fma2({hit}, residual{slot}, {word}, NATIVE)")

    def _turned_zeros(self, out: Source, group: int) -> None:
        """``zeros`` [W, 32, N]: products with what zeros of explicit pairs are, turned. Row
        16 chunk + 8 tile + g; neighbours have columns of their own."""
        start = "zeros" if group else "tl.zeros([W, 32, N], tl.float32)"
        whole = len(self.spec.octets_of(group)) == 2
        for i, member in enumerate("ab"):
            at = (f"zero_words + head * {4 * self.spec.explicit * 128}"
                  f" + {(2 * group + i) * 128} + opaque")  # fmt: skip
            chunks = f"(two * {self.spec.explicit * 256})[:, None, None]"
            out(
                f"words = {load_rows(f'({at})[None, :, None] + {chunks} + flat4', 128)}",
                "words = words.reshape([2, W, 32, 4]).permute([1, 2, 0, 3])",
                "x0, x1, y0, y1 = split4(words, [W, 32, 2])  # by half and tile",
                f"z{member}0, z{member}1 = tl.join(x0, x1), tl.join(y0, y1)",
            )
        products = [("za0", "za1", "a"), ("zb0", "zb1", "b")] if whole else [("za0", "zb0", "a")]
        for low, high, member in products:
            rows = f"zero_rows({low}, {high}, W, NATIVE)"
            out(f"zeros = tl.dot({rows}, right_{member}{group}, {start})")
            start = "zeros"

    def _finish_explicit(self, out: Source) -> None:
        """``score`` of explicit pairs: neighbours have columns of their own."""
        out(
            "here0, here1 = made.reshape([W, 64, Q, 2]).split()",
            "score = tl.where(second, here1, here0)",
        )

    def _finish(self, out: Source) -> None:
        """Scores from products: by offset of a series' two terms."""
        terms = ["score"] if self.spec.explicit else []
        if self._series:
            out("even, odd = kept.reshape([W, 64, Q, 2]).split()")
            terms.append("(even + away * odd)")
        out(f"score = {' + '.join(terms)}")
        if not (self.spec.scaled and self.spec.affine):
            return
        out("score *= factor[:, :, None]")
        if self.spec.zero_fragments:
            out(
                "zeros = zeros.reshape([W, 2, 2, 8, Q, 2]).permute([0, 1, 2, 5, 3, 4])",
                "score += zeros.reshape([W, 64, Q])",
            )
        if self._series:
            out(
                "even, odd = resting.reshape([W, 8, Q, 2]).split()",
                "score += every_row(even, W, Q) + away * every_row(odd, W, Q)",
            )


def table_words(out: Source, prefix: str, kind: str, bits: int) -> None:
    """The head's table: a pointer, and up to 4 bits its words on every lane. Lanes read copies of
    it, lest words come to lie in uniform registers, which byte permutes cannot read."""
    row = table_row(bits)
    out(f"{kind}_table = {kind}_bytes + head * {row}")
    out(f"{kind}_table_words = {kind}_table.to(tl.pointer_type(tl.int32))")
    for i in range(4):
        word = f"tl.load({kind}_table_words + 4 * t + {i})" if bits <= 4 else "0"
        out(f"{prefix}l{i} = ({word} + zero2)[:, :, None]")
