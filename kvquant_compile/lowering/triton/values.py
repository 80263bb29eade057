"""The half of the generated kernel that adds up values."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.lowering.triton.emit import CodeWords, Source, load_token_pairs
from kvquant_compile.lowering.triton.keys import half2, table_words
from kvquant_compile.lowering.triton.spec import KernelSpec, value_bias

WEIGHT_ONE = 32638
"""Of a weight times a token scale, the largest: rounding and the logarithm's error added, its upper
signed byte is 127 at most."""


@dataclass(frozen=True)
class ValueEmitter:
    """Writes the accumulation ``total{m}`` [W, 16, Q] of a page's values and the epilogue."""

    spec: KernelSpec
    words: CodeWords

    @property
    def tiles(self) -> int:
        """Groups of sixteen channels."""
        return self.spec.value_channels // 16

    def prologue(self, out: Source) -> None:
        """Zeroed sums and the table's words."""
        out("", "# sums: channels of a lane are contiguous, tile m holds 2 m and 2 m + 1 of each")
        for m in range(self.tiles):
            out(f"total{m} = tl.zeros([W, 16, Q], tl.float32)")
        out("mass = tl.zeros([W, 16, Q], tl.float32)", "flat = tl.zeros([W, 16, Q], tl.float32)")
        table_words(out, "v", "value", self.spec.layout.spec.value_bits)

    def load(self, out: Source, base: str) -> None:
        """Codes, and scales and zeros of the tokens, of the pages whose word pointers are
        ``base``."""
        self.words.load(out, base)
        words = self.spec.layout.offsets["value_scale_zero"][0] // 4
        out(f"pairs64 = {base}.to(tl.pointer_type(tl.int64))[:, None]")
        load_token_pairs(out, "both", f"pairs64 + {words // 2}")
        out(f"tokens_here = tl.load({base}[:, None] + {words} + in_page[None, :])")

    def load_slots(self, out: Source) -> None:
        """Slots of a page's tokens, well before they are needed."""
        at = self.spec.layout.offsets
        if self.spec.layout.spec.value_slots:
            out("halves16 = here.to(tl.pointer_type(tl.float16))[:, None]")
        for s in range(self.spec.layout.spec.value_slots):
            half = at["value_slot_residual"][0] // 2 + 64 * s
            word = (at["value_slot_index"][0] + 64 * s) // 4
            out(
                f"rest{s}_here = tl.load(halves16 + {half} + in_page[None, :])",
                f"bytes{s}_here = tl.load(here[:, None] + {word} + lane % 16)",
            )

    def accumulate(self, out: Source) -> None:
        """Adds a page's values, weighted by ``weight`` [W, 64, Q]."""
        out("", "# values")
        self._weights(out)
        self.words.split(out)
        self.words.unpack(out)
        for m in range(self.tiles):
            self._multiply(out, m)

    def _weights(self, out: Source) -> None:
        """Weights times token scales as whole numbers; sums of weights and of weighted zeros."""
        bias = value_bias(self.spec.layout.spec.value_bits)
        out(
            "both = word_rows(both0, both1, both2, both3, W)",
            "stride = lower_half(both).to(tl.float32)[:, :, None]",
            "middle = upper_half(both).to(tl.float32)[:, :, None]",
            "count = (weight * stride + 0.5).to(tl.int32)",
            "level = weight * middle",
        )
        if bias:
            out(f"level -= count.to(tl.float32) * {float(bias)}")
        for name, added in (("mass", "weight"), ("flat", "level")):
            total = f"tl.sum({added}.reshape([W, 4, 16, Q]), 1)"
            out(f"{name} = {name} * decay[:, None, :] + {total} * growth[:, None, :]")
        out("right = byte_weights(count, W, Q, NATIVE)")
        if self.spec.layout.spec.value_slots:
            self._slot_weights(out)

    def _slot_weights(self, out: Source) -> None:
        """Weights times slot residuals, and slot channels relative to the lane's first."""
        layout = self.spec.layout
        slots = range(layout.spec.value_slots)
        for s in slots:
            out(
                f"rest{s} = row_order(rest{s}_here, W)",
                f"far{s} = weight * rest{s}.to(tl.float32)[:, :, None]",
                f"farthest = tl.maximum(farthest, tl.abs(far{s}))" if s else
                "farthest = tl.abs(far0)",
            )  # fmt: skip
        out("slot_bound = tl.max(farthest, 1)")
        out("inverse = tl.where(slot_bound > 0, 1.0 / slot_bound, 0.0)")
        for s in slots:
            out(
                f"spread = (far{s} * inverse[:, None, :]).to(tl.float16)",
                f"slot_right{s} = weights_fragment(spread, W, Q)",
                f"first_channel = g * {self.spec.value_channels // 8}",
                f"places = value_tokens(bytes{s}_here, t, first_channel, W)",
                f"where{s}_0, where{s}_1 = places.split()",
            )

    def _multiply(self, out: Source, m: int) -> None:
        low, high = self.words.tiles(2 * m, 2 * m + 1)
        out(
            f"f0, f1 = value_levels({low}, {high},"
            f" vl0, vl1, vl2, vl3, value_table, {self.words.bits}, NATIVE)",
            "block = tl.dot(byte_rows(f0, f1, W, NATIVE), right, out_dtype=tl.int32)",
            "upper, lower = block.reshape([W, 16, Q, 2]).split()",
            "block = (upper * 256 + lower).to(tl.float32)",
            f"total{m} = total{m} * decay[:, None, :] + block * growth[:, None, :]",
        )
        for s in range(self.spec.layout.spec.value_slots):
            hits = [
                f"equal2(where{s}_{ih}, where{s}_{ih} * 0 + {half2(2 * m + r)}, NATIVE)"
                for r in range(2)
                for ih in range(2)
            ]
            start = f", block{s - 1}" if s else ""
            out(
                f"hits = value_rows({', '.join(hits)}, W, NATIVE)",
                f"block{s} = tl.dot(hits, slot_right{s}{start})",
            )
        if self.spec.layout.spec.value_slots:
            last = self.spec.layout.spec.value_slots - 1
            out(
                f"block, _ = block{last}.reshape([W, 16, Q, 2]).split()",
                f"total{m} += block * (slot_bound * growth)[:, None, :]",
            )

    def epilogue(self, out: Source) -> None:
        """Merges the warps and stores normalised sums [Q, value_dim] and log2-sum-exps [Q]."""
        dim = self.spec.layout.value_dim
        out(
            "",
            "# merge the warps",
            "top = tl.max(peak, 0)",
            "share = tl.exp2(peak - tl.where(top == float('-inf'), 0.0, top)[None, :])",
            "mass2 = tl.sum(mass, 1) * share",
            "flat2 = tl.sum(flat, 1) * share",
            "whole = tl.sum(mass2, 0)",
            "level = tl.sum(flat2, 0)",
            "over = tl.where(whole > 0, 1.0 / whole, 0.0)",
            "target = ((tl.program_id(0) * tl.num_programs(2) + tile) * splits + split) * Q",
            "tl.store(partial_lse + target + tl.arange(0, Q), tl.where(whole > 0,"
            " top + tl.log2(whole), float('-inf')))",
            f"to = partial + (target + tl.arange(0, Q)[None, :]) * {dim}",
        )
        for m in range(self.tiles):
            out(
                f"channel = (m16 % 8) * {self.spec.value_channels // 8} + {2 * m} + m16 // 8",
                f"valid = channel < {dim}",
                f"factor = tl.load(gain + head * {dim} + channel, mask=valid, other=0.0)",
                f"base_value = tl.load(offset + head * {dim} + channel, mask=valid, other=0.0)",
                f"summed = tl.sum(total{m} * share[:, None, :], 0) + level[None, :]",
                "summed = summed * over[None, :] * factor[:, None] + base_value[:, None]",
                "tl.store(to + channel[:, None], summed, mask=valid[:, None])",
            )
