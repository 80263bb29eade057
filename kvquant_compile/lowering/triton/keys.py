"""The half of the generated kernel that turns key codes into scores."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.triton.emit import CodeWords, Source
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
        out("magnitude = " + (peaks[0] if len(peaks) == 1 else
            f"tl.join({peaks[0]}, {peaks[1]}).permute([0, 2, 1]).reshape([W, N])"))  # fmt: skip
        out("enlarge = tl.load(key_factor + head)", "key_shrink = 1.0 / enlarge")
        out("unit = magnitude * (scale * enlarge)")
        out("peak = tl.full([W, N], float('-inf'), tl.float32)")
        table_words(out, "k", "key", self.spec.layout.spec.key_bits)

    def _load_queries(self, out: Source, block: int) -> None:
        """One load [2 members, octets, 2 halves, W, 32], rounded up to a power of two, and its
        split into q_words."""
        count = 1 << (self.octets - 1).bit_length()
        out(
            f"q_parts = tl.arange(0, {4 * count})[:, None, None]",
            f"q_octet = q_parts % {2 * count} // 2",
            f"q_channel = q_parts // {2 * count} * {self.spec.pairs} + 8 * q_octet"
            " + 2 * t[None] + q_parts % 2",
            f"q_known = (q_octet < {self.octets}) & (tl.zeros([1, W, 32], tl.int32) == 0)",
        )
        if self.spec.reorder:
            out("q_channel = tl.load(query_order + q_channel, mask=q_known, other=0)")
        out(
            f"n = tile * N + {8 * block} + g[None]",
            "q_rows = query + row * query_batch + (head * rep + n // steps) * query_head"
            " + (n % steps) * query_step",
            f"q_known &= (n < rep * steps) & (q_channel < {self.spec.layout.key_dim})",
            "q_loaded = tl.load(q_rows + q_channel, mask=q_known, other=0.0).to(tl.float32)",
            f"magnitude{block} = tl.max(tl.max(tl.abs(q_loaded), 0).reshape([W, 8, 4]), 2)",
            f"magnitude{block} = tl.where(magnitude{block} > 0, magnitude{block}, 1.0)",
            f"q_over = tl.broadcast_to(1.0 / magnitude{block}[:, :, None], [W, 8, 4])",
            "q_loaded = q_loaded * q_over.reshape([1, W, 32])",
            f"q_low, q_high = q_loaded.reshape([{2 * count}, 2, W, 32]).permute([0, 2, 3, 1]).split()",
            "q_words = pack_halves(q_low, q_high)",
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
        """Right operands ``b{member}{group}`` with the queries turned back by the page's base."""
        rotated = min(self.octets, -(-self.spec.rotated // 2) * 2)
        if rotated:
            out("origin = (base + page * 64).to(tl.int64)[:, None]")
        for first in range(0, rotated, 8):
            j = first // 8
            out(f"octet = {first} + g + zero2", f"known = octet < {rotated}")
            for half in range(2):
                out(
                    f"pair = octet * 8 + 2 * t + {half}",
                    "turn = tl.load(turns + pair, mask=known, other=0)",
                    "stretch = tl.load(rope_scale + pair, mask=known, other=1.0)",
                    f"cos{half}, sin{half} = circle(((origin * turn) >> 32).to(tl.int32), NATIVE)",
                    f"cos{half} *= stretch",
                    f"sin{half} *= stretch",
                )
            out(
                f"cos_words{j} = pack_halves(cos0, cos1)", f"sin_words{j} = pack_halves(sin0, sin1)"
            )
        for octet in range(self.octets):
            if octet < rotated:
                which = f"{4 * (octet % 8)} + t + zero2"
                out(
                    f"cos = tl.gather(cos_words{octet // 8}, {which}, 1)",
                    f"sin = tl.gather(sin_words{octet // 8}, {which}, 1)",
                )
            for block in self._blocks:
                a, b = (f"q{m}{octet}_{block}" for m in "ab")
                turned = f"rotate2({b}, {a}, cos, sin, NATIVE)" if octet < rotated else f"{b}, {a}"
                out(f"r{b[1:]}, r{a[1:]} = {turned}")
        for group in range(self.groups):
            self._right_operands(out, group)

    def _right_operands(self, out: Source, group: int) -> None:
        octets = self._octets_of(group)
        if len(octets) == 2:
            pairs = {m: [(m, octets[0]), (m, octets[1])] for m in "ab"}
        else:
            pairs = {"a": [("a", octets[0]), ("b", octets[0])]}
        for member, halves in pairs.items():
            words = [f"r{m}{o}_{b}" for b in self._blocks for m, o in halves]
            call = "right_fragment" if len(words) == 2 else "right_fragments"
            out(f"right_{member}{group} = {call}({', '.join(words)}, W, NATIVE)")

    def _constants(self, out: Source, group: int) -> None:
        """Scale, centre and zero words of a group of pairs, [W, 32, 1, 1]."""
        count = 3 if self.spec.layout.spec.key_token_scale else 2
        out(f"constants = key_words + head * {self.groups * count * 128} + opaque[:, None, None]")
        for kind in range(count):
            first = (group * count + kind) * 128
            names = [f"c{kind}{m}{k}" for m in "ab" for k in range(2)]
            out(f"{', '.join(names)} = split4(tl.load(constants + {first} + lane_x4), [W, 32])")
            out(*(f"{name} = {name}[:, :, None, None]" for name in names))

    def _tokens(self, out: Source) -> None:
        """Token scales and slots of a lane's tokens, as doubled halves [W, 32, 4, 2]."""
        layout = self.spec.layout
        rows = "four[:, None, None] // 2 * 16 + four[:, None, None] % 2 + 2 * g[None]"
        words = "here[None, :, None]"
        if layout.spec.key_token_scale:
            first = layout.offsets["key_token_scale"][0] // 4
            out(f"factor = pair_tokens(tl.load({words} + {first} + {rows}), W)")
        for slot in range(layout.spec.key_slots):
            first = layout.offsets["key_slot_residual"][0] // 4 + 32 * slot
            at = (layout.offsets["key_slot_index"][0] + 64 * slot) // 4
            out(
                f"rest = tl.load({words} + {first} + {rows})",
                "rest_low = lower_half(rest).to(tl.float32) * key_shrink",
                "rest_high = upper_half(rest).to(tl.float32) * key_shrink",
                f"residual{slot} = pair_tokens(pack_halves(rest_low, rest_high), W)",
                f"bytes4 = tl.load({words} + {at} + 8 * two[:, None, None] + g[None])",
                "byte = tokens_of_word(bytes4.permute([1, 2, 0]), W)",
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
        tiles = f"(eight // 2 * {groups * 256} + eight % 2 * 128)[:, None, None, None]"
        out(
            f"turned = tl.load(offset_words + {group * 256} + {tiles} + lane_x4[None]"
            " + opaque[None, :, None, None])",
            "turned = turned.permute([1, 2, 0, 3]).reshape([W, 32, 4, 2, 4])",
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
