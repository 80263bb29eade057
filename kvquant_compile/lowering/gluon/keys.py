"""From key codes to scores.

With table bytes u, scales s, zeros z and the token scale a, a key is ``s (a (u - bias) + z)``,
turned by its position. For a page whose middle is at n, and i the token's offset from it, the
score of a pair is ``(R(-n) q)' R(i) k``. Two rules, by how far a pair turns within half a page:

* *explicit*: the bytes become halves, scaled, and are turned by a table of offsets
  (:mod:`.explicit`);
* *series* (:mod:`kvquant_compile.lowering.series`): nothing happens to the key. Every term is a
  matrix column of the query, and polynomials of the token's offset multiply sums. Scales go into
  the query (:mod:`.levels`); bytes enter as 1024 + u, and what that adds, as well as the zeros, is
  a constant per page and term. Two terms a query are free where it has two columns anyway; a lone
  query has eight.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.gluon.explicit import ExplicitEmitter
from kvquant_compile.lowering.gluon.fragments import (
    HIGH_1024,
    ONES,
    key_fragment,
    load_codes,
    load_shared,
    product,
    reduce_lanes,
    table_words,
    unpack,
)
from kvquant_compile.lowering.gluon.levels import WORDS
from kvquant_compile.lowering.gluon.memory import Constants, Memory
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.visibility import TOKENS
from kvquant_compile.lowering.gluon.writer import KernelWriter, registers


@dataclass(frozen=True)
class KeyEmitter:
    """Writes scores ``s{group}_{j}`` of a lane's tokens j = 0..7 for its query of every group.

    Sums of products are ``c{group}_{i}`` where fragments hold a series, else ``plain_{i}``; of
    the four that a lane has of a tile, r = i // 2 is one of its two tokens.
    """

    spec: GluonSpec
    memory: Memory

    @property
    def _explicit(self) -> ExplicitEmitter:
        return ExplicitEmitter(self.spec, self.memory)

    def prologue(self, out: KernelWriter) -> None:
        """The table, and what rotations need, in registers."""
        sections = Constants(self.spec)
        names = [f"key_table{i}" for i in range(4)]
        load_shared(out, names, "shared + t * 16", self.memory.constants + sections.tables)
        self._explicit.prologue(out)
        if self.spec.terms > 2:
            at = self.memory.constants + sections.polynomials
            names = [f"{kind}{j}" for j in range(8) for kind in ("even", "odd")]
            where = f"shared + ((t & {self.spec.span - 1}) * 8 + g) * 64"
            load_shared(out, names, where, *range(at, at + 64, 16), kind="f")

    def scores(self, out: KernelWriter, chunk: int) -> None:
        """Scores of the lane's four tokens of a chunk."""
        bits = self.spec.layout.spec.key_bits
        count = self.spec.key_groups * bits
        words = [f"k{i}" for i in range(count)]
        out("", f"# keys of chunk {chunk}")
        load_codes(out, words, "here", chunk * 128 * count)
        if self.spec.scaled:
            self._token_scales(out, chunk)
        selectors: list[str] = []
        for index in range(0, 4 * self.spec.key_groups, 2):
            if index % 4 == 0:
                selectors = unpack(out, words, bits, index // 4)
            tile, pairs = divmod(index // 2, self.spec.key_groups)
            mine = selectors[index % 4 : index % 4 + 2]
            self._multiply(out, mine, 2 * chunk + tile, pairs)
            if pairs == self.spec.key_groups - 1:
                for r in range(2):
                    self._finish(out, chunk, tile, r)

    def _token_scales(self, out: KernelWriter, chunk: int) -> None:
        """``scale{j}``: token scales of the lane's tokens of a chunk."""
        at = self.spec.layout.offsets["key_token_scale"][0] + 64 * chunk
        text = (
            f".reg .b16 h0, h1, h2, h3; ld.shared.v4.b16 {{h0, h1, h2, h3}}, [$4+{at}];\n"
            + "".join(f"cvt.f32.f16 ${i}, h{i};\n" for i in range(4))
        )
        names = [f"scale{4 * chunk + i}" for i in range(4)]
        out.ptx(text, names, ["here + g * 8"], into="ffff", name="TOKEN_SCALES")

    def _starts(self, pairs: int) -> list[str]:
        """What the first products of a tile start from: bytes' levels, or zero."""
        if self._series(pairs):
            return [f"level{group}_{i}" for group in range(self.spec.groups) for i in range(4)]
        return ["zero" if self.spec.rotates else f"level0_{i}" for i in range(4)]

    def _series(self, pairs: int) -> bool:
        """Whether the fragments of a group of pairs hold terms of a series."""
        return self.spec.rotates and pairs >= self.spec.explicit

    def _sums(self, pairs: int) -> list[str]:
        if not self._series(pairs):
            return [f"plain_{i}" for i in range(4)]
        return [f"c{group}_{i}" for group in range(self.spec.groups) for i in range(4)]

    def _multiply(self, out: KernelWriter, selectors: list[str], tile: int, pairs: int) -> None:
        """Add a group of pairs to the products of a tile."""
        codes = [f"key_table{i}" for i in range(table_words(self.spec.layout.spec.key_bits))]
        kept, fragments = "q" if self.spec.rotates else "p", self.spec.fragments(pairs)
        queries = [f"{kept}{fragment}_{pairs}_{x}" for fragment in fragments for x in WORDS]
        sums = self._sums(pairs)
        begins = pairs == 0 or self._series(pairs) != self._series(pairs - 1)
        before = self._starts(pairs) if begins else sums
        explicit = self._explicit if pairs < self.spec.explicit else None
        extra = explicit.load(out, tile, pairs) if explicit else []
        inputs = [*selectors, *codes, *queries, *extra, *before]
        kinds = "r" * (len(inputs) - len(before)) + "f" * len(before)
        text = _product_text(len(fragments), len(codes), explicit)
        name = "KEYS_EXPLICIT" if explicit else "KEYS_SERIES"
        out.ptx(text, sums, inputs, kinds=kinds, into="f" * len(sums), name=name)
        if explicit and self.spec.zero_fragments:
            explicit.zeros(out, tile, pairs)

    def _finish(self, out: KernelWriter, chunk: int, tile: int, r: int) -> None:
        """The score of one token from its products."""
        j = 4 * chunk + 2 * tile + r
        turns = self.spec.rotates and bool(self.spec.series)
        for group in range(self.spec.groups):
            terms = []
            if self.spec.explicit or not turns:
                terms.append(self._explicit.sum_of(r, group))
            if turns:
                terms.append(self._by_offset(j, f"c{group}_{2 * r}", f"c{group}_{2 * r + 1}"))
            score = " + ".join(terms)
            if self.spec.scaled:
                score = " + ".join([f"scale{j} * ({score})", *self._zeros(group, j, tile, r)])
            out(f"s{group}_{j} = {score}")
            if self.spec.span > 1:  # terms are spread over the token's lanes
                reduce_lanes(out, f"s{group}_{j}", "{} + {}", lanes=(1, 2)[: self.spec.span // 2])

    def _by_offset(self, j: int, even: str, odd: str) -> str:
        """The lane's two terms of a series, by the token's offset."""
        if self.spec.terms > 2:
            return f"even{j} * {even} + odd{j} * {odd}"
        return f"{even} + (middle + {TOKENS[j] / 32}) * {odd}"  # in half pages

    def _zeros(self, group: int, j: int, tile: int, r: int) -> list[str]:
        """What zeros add to a scaled score."""
        turns = self.spec.rotates and bool(self.spec.series)
        terms = []
        if self.spec.zero_fragments:
            terms.append(self._explicit.zero_of(tile, r, group))
        if turns:
            terms.append(self._by_offset(j, f"zeros{group}_0", f"zeros{group}_1"))
        elif self.spec.series:
            terms.append(f"zeros0_{group}")
        return terms


def _product_text(fragments: int, table_size: int, explicit: ExplicitEmitter | None) -> str:
    """Two selectors to fragments of keys, perhaps rotated, times fragments of queries.

    Operands: sums, selectors, table words, query words, for explicit ones what turns them, and what
    the sums start from.
    """
    n = 4 * fragments
    table = registers(n + 2, table_size)
    queries = registers(n + 2 + table_size, n)
    rest = n + 2 + table_size + n
    text = ".reg .b32 x, y, tmp, one; .reg .b32 a<4>, b<4>;\n"
    text += f"mov.b32 one, {ONES};\n"
    a, b = [f"a{i}" for i in range(4)], [f"b{i}" for i in range(4)]
    high = "0" if explicit else HIGH_1024
    text += key_fragment(a, f"${n}", table, high) + key_fragment(b, f"${n + 1}", table, high)
    if explicit:
        text += explicit.text(registers(rest, explicit.words))
        a, b = [f"p{i}" for i in range(4)], [f"q{i}" for i in range(4)]
        rest += explicit.words
    for fragment in range(fragments):
        d, q = registers(4 * fragment, 4), queries[4 * fragment : 4 * fragment + 4]
        text += product(d, a, q[:2], registers(rest + 4 * fragment, 4)) + product(d, b, q[2:], d)
    return text
