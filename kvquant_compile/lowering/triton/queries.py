"""The half of the generated kernel that makes matrix operands of queries.

A query takes two columns. Of pairs whose rotation is a series they are its terms; of explicit ones
the query, and the query turned back by a token, for the second one of neighbours that share a
rotation. Both are linear in the query's members, and commute with turning it to a page.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.triton.emit import Source
from kvquant_compile.lowering.triton.spec import KernelSpec


@dataclass(frozen=True)
class QueryEmitter:
    """Writes the operands ``right_{member}{group}``."""

    spec: KernelSpec

    @property
    def _blocks(self) -> range:
        return range(self.spec.columns // 8)

    def prologue(self, out: Source) -> None:
        """Loads the queries as fragment words ``q{member}{octet}_{block}``, each query over its
        largest magnitude."""
        out("", "# queries: word (member, octet of pairs, block of 8 columns)")
        for block in self._blocks:
            self._load(out, block)
        peaks = [f"magnitude{b}" for b in self._blocks]
        joined = f"tl.join({', '.join(peaks)}).permute([1, 0]).reshape([Q])"
        out("magnitude = " + (peaks[0] if len(peaks) == 1 else joined))
        log = "" if self.spec.softcap else " * 1.4426950408889634"
        out(f"unit = magnitude[None, :] * (tl.abs(scale) * tl.load(key_unit + head){log})")
        for group in range(self.spec.explicit, self.spec.groups):
            at = f"key_words + (head * {self.spec.groups} + {group}) * 384"
            out(f"words = tl.load({at} + flat4[None, :] + warp1[:, None] * 0)")
            names = [f"w{m}{k}_{group}" for m in "ab" for k in range(2)]
            out(f"{', '.join(names)} = split4(words, [W, 32])")
        for group in range(self.spec.groups):
            if not self.spec.turns(group):  # the same for every page
                self._operands(out, group, "q")
        for j in range(-(-self._rotated // 8)):
            out(
                f"pair = {64 * j} + in_page[None, :] + warp1[:, None] * 0",
                f"known = pair < {min(8 * self._rotated, self.spec.pairs)}",
                f"turn{j} = tl.load(turns + pair, mask=known, other=0)",
            )
            if self.spec.stretched:
                out(f"stretch{j} = tl.load(rope_scale + pair, mask=known, other=1.0)")

    @property
    def _rotated(self) -> int:
        """Octets of groups that turn."""
        return min(self.spec.octets, -(-self.spec.rotated // 2) * 2)

    def _load(self, out: Source, block: int) -> None:
        """One load [8 columns, channels in pair order] of either member, octets rounded up to a
        power of two, and its split into words."""
        count = 1 << (self.spec.octets - 1).bit_length()
        pairs = self.spec.pairs
        out(
            f"q_element = tl.arange(0, {16 * count})[None, :]",
            f"q_pair = q_element % {8 * count}",
            f"q_second = q_element // {8 * count}",
            f"n = tile * Q + {4 * block} + eight[:, None] // 2",
            "q_rows = query + row * query_batch + (head * rep + n // steps) * query_head"
            " + (n % steps) * query_step",
            f"q_known = (q_pair < {pairs}) & (n < rep * steps)",
        )
        for name, member in (("mine", "q_second"), ("other", "(1 - q_second)")):
            out(f"q_channel = {member} * {pairs} + q_pair")
            if self.spec.reorder:
                out(f"q_channel = tl.load(query_order + q_channel, mask=q_pair < {pairs}, other=0)")
            out(
                f"q_mask = q_known & (q_channel < {self.spec.layout.key_dim})",
                f"q_{name} = tl.load(q_rows + q_channel, mask=q_mask, other=0.0).to(tl.float32)",
            )
        out(
            "magnitude8 = tl.max(tl.abs(q_mine), 1)",
            "magnitude8 = tl.where(magnitude8 > 0, magnitude8, 1.0)",
            f"magnitude{block} = tl.max(magnitude8.reshape([4, 2]), 1)",
            f"q_term = query_terms + (head * {16 * self.spec.groups} + q_pair) * 4"
            " + eight[:, None] % 2 * 2",
            f"q_factor = tl.load(q_term, mask=q_pair < {pairs}, other=0.0)",
            f"q_cross = tl.load(q_term + 1, mask=q_pair < {pairs}, other=0.0)",
            "q_cross = tl.where(q_second == 1, -q_cross, q_cross)",
            "q_loaded = (q_mine * q_factor + q_other * q_cross) / magnitude8[:, None]",
            "q_loaded = tl.where(scale < 0, -q_loaded, q_loaded)",
            f"q_loaded = q_loaded.reshape([8, {2 * count}, 4, 2]).permute([1, 0, 2, 3])",
            "q_low, q_high = q_loaded.split()",
            f"q_words = pack_halves(q_low, q_high).reshape([{2 * count}, 1, 32])",
            f"q_words = tl.broadcast_to(q_words, [{2 * count}, W, 32])",
        )
        _split_front(out, "q_words", [f"q{m}{o}_{block}" for m in "ab" for o in range(count)])

    def angles(self, out: Source) -> None:
        """Words of cosines and sines of the positions of the pages' middles, from ``base``, the
        offset between positions and slots, and ``slots_here``."""
        rotated = self._rotated
        if rotated:
            out("origin = (base[:, None] + slots_here + 32 - in_page[None, :]).to(tl.int64)")
        for j in range(-(-rotated // 8)):
            out(f"cos, sin = circle(((origin * turn{j}) >> 32).to(tl.int32), NATIVE)")
            if self.spec.stretched:
                out(f"cos, sin = cos * stretch{j}, sin * stretch{j}")
            out(
                "cos0, cos1 = cos.reshape([W, 32, 2]).split()",
                "sin0, sin1 = sin.reshape([W, 32, 2]).split()",
                f"cos_words{j} = pack_halves(cos0, cos1)",
                f"sin_words{j} = pack_halves(sin0, sin1)",
            )

    def group(self, out: Source, group: int) -> None:
        """The operands of a group that turns."""
        for octet in self.spec.octets_of(group) if self.spec.turns(group) else ():
            which = f"{4 * (octet % 8)} + t + zero2"
            out(
                f"cos_base = tl.gather(cos_words{octet // 8}, {which}, 1)",
                f"sin_base = tl.gather(sin_words{octet // 8}, {which}, 1)",
            )
            for block in self._blocks:
                a, b = (f"{m}{octet}_{block}" for m in "ab")
                out(f"r{b}, r{a} = rotate2(q{b}, q{a}, cos_base, sin_base, NATIVE)")
        if self.spec.turns(group):
            self._operands(out, group, "r")

    def _operands(self, out: Source, group: int, prefix: str) -> None:
        octets = self.spec.octets_of(group)
        if group >= self.spec.explicit:  # keys enter as bytes: their scales are the queries'
            for k, octet in enumerate(octets):
                for m in "ab":
                    for b in self._blocks:
                        word = f"{m}{octet}_{b}"
                        out(f"s{word} = mul2({prefix}{word}, w{m}{k}_{group}, NATIVE)")
            prefix = "s"
        if len(octets) == 2:
            pairs = {m: [(m, octets[0]), (m, octets[1])] for m in "ab"}
        else:
            pairs = {"a": [("a", octets[0]), ("b", octets[0])]}
        for member, halves in pairs.items():
            words = [f"{prefix}{m}{o}_{b}" for b in self._blocks for m, o in halves]
            call = "right_fragment" if len(words) == 2 else "right_fragments"
            out(f"right_{member}{group} = {call}({', '.join(words)}, W, NATIVE)")


def _split_front(out: Source, name: str, targets: list[str]) -> None:
    """A tensor [n, W, 32], n a power of two, as n variables [W, 32]."""
    if len(targets) == 1:
        out(f"{targets[0]} = {name}.reshape([W, 32])")
        return
    half = len(targets) // 2
    out(f"{name}0, {name}1 = {name}.reshape([2, {half}, W, 32]).permute([1, 2, 3, 0]).split()")
    _split_front(out, f"{name}0", targets[:half])
    _split_front(out, f"{name}1", targets[half:])
