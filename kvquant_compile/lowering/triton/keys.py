"""The half of the generated kernel that turns key codes into scores."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.triton.emit import CodeWords, Source, load_rows
from kvquant_compile.lowering.triton.spec import KernelSpec


def half2(number: int) -> str:
    """A small whole number as two equal halves in a signed word, as source."""
    import numpy

    bits = int(numpy.float16(number).view(numpy.uint16))
    word = bits << 16 | bits
    return str(word - (1 << 32) if word >= 1 << 31 else word)


@dataclass(frozen=True)
class KeyEmitter:
    """Writes the query fragments and, per page, ``score{chunk}{tile}`` [W, 16, N]."""

    spec: KernelSpec
    words: CodeWords

    @property
    def octets(self) -> int:
        """Groups of eight pairs; two of them share a matrix slice pair, an odd last one a slice."""
        return self.spec.pairs // 8

    @property
    def groups(self) -> int:
        """Groups of sixteen pairs, the last of them perhaps of eight."""
        return -(-self.octets // 2)

    def _octets_of(self, group: int) -> range:
        return range(2 * group, min(2 * group + 2, self.octets))

    def _turns(self, group: int) -> bool:
        return 2 * group < self.spec.rotated

    @property
    def _blocks(self) -> range:
        return range(self.spec.columns // 8)

    def prologue(self, out: Source) -> None:
        """Loads the queries as fragment words ``q{member}{octet}_{block}``, each row over its
        largest magnitude, and the table's words."""
        out("", "# queries: word (member, octet of pairs, block of 8 columns)")
        for block in self._blocks:
            self._load_queries(out, block)
        peaks = [f"magnitude{b}" for b in self._blocks]
        joined = f"tl.join({', '.join(peaks)}).permute([1, 0]).reshape([1, N])"
        out("magnitude = " + (f"{peaks[0]}[None, :]" if len(peaks) == 1 else joined))
        out("enlarge = tl.load(key_factor + head)", "key_shrink = 1.0 / enlarge")
        log = "" if self.spec.softcap else " * 1.4426950408889634"
        out(f"unit = magnitude * (scale * enlarge{log})")
        out("peak = tl.full([W, N], float('-inf'), tl.float32)")
        table_words(out, "k", "key", self.spec.layout.spec.key_bits)
        for group in range(self.groups):
            if not self._turns(group):  # the same for every page
                self._right_operands(out, group, "q")

    def _load_queries(self, out: Source, block: int) -> None:
        """One load [8 columns, channels in pair order], octets rounded up to a power of two, and
        its split into words."""
        count = 1 << (self.octets - 1).bit_length()
        out(
            f"q_element = tl.arange(0, {16 * count})[None, :]",
            f"q_octet = q_element // 8 % {count}",
            f"q_channel = q_element // {8 * count} * {self.spec.pairs} + 8 * q_octet"
            " + q_element % 8",
            f"q_known = q_octet < {self.octets}",
        )
        if self.spec.reorder:
            out("q_channel = tl.load(query_order + q_channel, mask=q_known, other=0)")
        out(
            f"n = tile * N + {8 * block} + eight[:, None]",
            "q_rows = query + row * query_batch + (head * rep + n // steps) * query_head"
            " + (n % steps) * query_step",
            f"q_known = q_known & (q_channel < {self.spec.layout.key_dim}) & (n < rep * steps)",
            "q_loaded = tl.load(q_rows + q_channel, mask=q_known, other=0.0).to(tl.float32)",
            f"magnitude{block} = tl.max(tl.abs(q_loaded), 1)",
            f"magnitude{block} = tl.where(magnitude{block} > 0, magnitude{block}, 1.0)",
            f"q_loaded = q_loaded / magnitude{block}[:, None]",
            f"q_loaded = q_loaded.reshape([8, {2 * count}, 4, 2]).permute([1, 0, 2, 3])",
            "q_low, q_high = q_loaded.split()",
            f"q_words = pack_halves(q_low, q_high).reshape([{2 * count}, 1, 32])",
            f"q_words = tl.broadcast_to(q_words, [{2 * count}, W, 32])",
        )
        _split_front(out, "q_words", [f"q{m}{o}_{block}" for m in "ab" for o in range(count)])

    def scores(self, out: Source) -> None:
        """Unpacks a page's keys and multiplies them with the queries: ``score`` [W, 64, N]."""
        out("", "# keys")
        self._turn_queries(out)
        self.words.split(out)
        self.words.unpack(out)
        self._tokens(out)
        for group in range(self.groups):
            self._constants(out, group)
            self._multiply(out, group)

    def _turn_queries(self, out: Source) -> None:
        """Right operands of the groups that turn: queries turned back by the page's base."""
        rotated = min(self.octets, -(-self.spec.rotated // 2) * 2)
        if rotated:
            out("origin = (base + page * 64).to(tl.int64)[:, None]")
        for first in range(0, rotated, 8):
            j = first // 8
            out(
                f"pair = {8 * first} + in_page[None, :] + warp1[:, None] * 0",
                f"known = pair < {min(8 * rotated, self.spec.pairs)}",
                "turn = tl.load(turns + pair, mask=known, other=0)",
                "stretch = tl.load(rope_scale + pair, mask=known, other=1.0)",
                "cos, sin = circle(((origin * turn) >> 32).to(tl.int32), NATIVE)",
                "cos0, cos1 = (cos * stretch).reshape([W, 32, 2]).split()",
                "sin0, sin1 = (sin * stretch).reshape([W, 32, 2]).split()",
            )
            out(
                f"cos_words{j} = pack_halves(cos0, cos1)", f"sin_words{j} = pack_halves(sin0, sin1)"
            )
        for octet in range(rotated):
            which = f"{4 * (octet % 8)} + t + zero2"
            out(
                f"cos_base = tl.gather(cos_words{octet // 8}, {which}, 1)",
                f"sin_base = tl.gather(sin_words{octet // 8}, {which}, 1)",
            )
            for block in self._blocks:
                a, b = (f"{m}{octet}_{block}" for m in "ab")
                out(f"r{b}, r{a} = rotate2(q{b}, q{a}, cos_base, sin_base, NATIVE)")
        for group in range(self.groups):
            if self._turns(group):
                self._right_operands(out, group, "r")

    def _right_operands(self, out: Source, group: int, prefix: str) -> None:
        octets = self._octets_of(group)
        if len(octets) == 2:
            pairs = {m: [(m, octets[0]), (m, octets[1])] for m in "ab"}
        else:
            pairs = {"a": [("a", octets[0]), ("b", octets[0])]}
        for member, halves in pairs.items():
            words = [f"{prefix}{m}{o}_{b}" for b in self._blocks for m, o in halves]
            call = "right_fragment" if len(words) == 2 else "right_fragments"
            out(f"right_{member}{group} = {call}({', '.join(words)}, W, NATIVE)")

    def _constants(self, out: Source, group: int) -> None:
        """Scale, centre and zero words of a group of pairs, [W, 32, 1, 1]."""
        count = 3 if self.spec.layout.spec.key_token_scale else 2
        out(f"constants = key_words + head * {self.groups * count * 128} + opaque[:, None]")
        for kind in range(count):
            first = (group * count + kind) * 128
            names = [f"c{kind}{m}{k}" for m in "ab" for k in range(2)]
            out(f"words = tl.load(constants + {first} + flat4[None, :])")
            out(f"{', '.join(names)} = split4(words, [W, 32])")
            out(*(f"{name} = {name}[:, :, None, None]" for name in names))

    def _tokens(self, out: Source) -> None:
        """Token scales and slots of a lane's tokens, as doubled halves [W, 32, 4, 2]."""
        layout = self.spec.layout
        at = layout.offsets
        if layout.spec.key_token_scale:
            first = at["key_token_scale"][0] // 4
            out(f"factor = pair_tokens(tl.load(here[:, None] + {first} + lane), g, W)")
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
        octets = self._octets_of(group)
        whole = len(octets) == 2
        bits, per_tile = self.words.bits, self.spec.pairs // 8
        for i, member in enumerate("ab" if whole else "a"):
            index = 2 * group + i
            low, high = self.words.tiles(index, per_tile + index)
            out(
                f"f00, f01, f10, f11 = levels({low}, {high},"
                f" kl0, kl1, kl2, kl3, key_table, {bits}, NATIVE)",
                f"{member}0 = tl.join(f00, f10)",
                f"{member}1 = tl.join(f01, f11)",
            )
        if not whole:  # one slice: column half 0 is member a, half 1 member b
            out("b0 = a1")
        for k in range(len(octets)):
            self._element(out, group, k)
        if self._turns(group):
            self._rotate(out, group)
        score = "score" if group else "tl.zeros([W, 64, N], tl.float32)"
        if whole:
            out(f"score = tl.dot(key_rows(a0, a1, W, NATIVE), right_a{group}, {score})")
            out(f"score = tl.dot(key_rows(b0, b1, W, NATIVE), right_b{group}, score)")
        else:
            out(f"score = tl.dot(key_rows(a0, b0, W, NATIVE), right_a{group}, {score})")

    def _element(self, out: Source, group: int, k: int) -> None:
        """Scale, zero, token scale and slots of a word of each member."""
        spec = self.spec.layout.spec
        octet = self._octets_of(group)[k]
        for m in range(2):
            word = const = f"{'ab'[m]}{k}"
            out(f"{word} = fma2({word}, c0{const}, c1{const}, NATIVE)")
            if spec.key_token_scale:
                out(f"{word} = fma2({word}, factor, c2{const}, NATIVE)")
            for slot in range(spec.key_slots):
                channel = half2(m * self.spec.pairs + 8 * octet)
                hit = f"equal2(channel{slot}, channel{slot} * 0 + {channel}, NATIVE)"
                out(f"{word} = fma2({hit}, residual{slot}, {word}, NATIVE)")

    def _rotate(self, out: Source, group: int) -> None:
        groups = -(-self.spec.rotated // 2)
        tiles = f"(eight // 2 * {groups * 256} + eight % 2 * 128)[:, None, None]"
        out(
            "offset_table = (offset_words + opaque)[None, :, None]",
            f"turned = {load_rows(f'offset_table + {group * 256} + {tiles} + flat4', 128)}",
            "turned = turned.reshape([8, W, 32, 4]).permute([1, 2, 0, 3])",
            "cos0, cos1, sin0, sin1 = split4(turned, [W, 32, 4, 2])",
        )
        for k in range(len(self._octets_of(group))):
            out(f"a{k}, b{k} = rotate2(a{k}, b{k}, cos{k}, sin{k}, NATIVE)")


def table_words(out: Source, prefix: str, kind: str, bits: int) -> None:
    """The head's table: a pointer, and up to 4 bits its words on every lane."""
    row = max(2**bits, 16)
    out(f"{kind}_table = {kind}_bytes + head * {row}")
    out(f"{kind}_table_words = {kind}_table.to(tl.pointer_type(tl.int32))")
    for i in range(4):
        out(f"{prefix}l{i} = (tl.load({kind}_table_words + {i}) + zero2)[:, :, None]")


def _split_front(out: Source, name: str, targets: list[str]) -> None:
    """A tensor [n, W, 32], n a power of two, as n variables [W, 32]."""
    if len(targets) == 1:
        out(f"{targets[0]} = {name}.reshape([W, 32])")
        return
    half = len(targets) // 2
    out(f"{name}0, {name}1 = {name}.reshape([2, {half}, W, 32]).permute([1, 2, 3, 0]).split()")
    _split_front(out, f"{name}0", targets[:half])
    _split_front(out, f"{name}1", targets[half:])
