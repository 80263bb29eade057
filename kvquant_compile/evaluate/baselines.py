"""Published codecs to compare with, as round trips; sources in each docstring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.calib.fit_published import inlier_levels, percentiles
from kvquant_compile.calib.observe import Observed
from kvquant_compile.codec.algebra import Codec, Recipe

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Fp8:
    """FP8 e4m3 with one scale per tensor, after RoPE; what vLLM's ``fp8`` cache does."""

    pre_rope: bool = False

    def keys(self, x: Tensor, layer: int) -> Tensor:
        """[B, H, S, D] -> the same, rounded."""
        scale = x.float().abs().amax().clamp(min=1e-12) / E4M3_MAX
        return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale

    def values(self, x: Tensor, layer: int) -> Tensor:
        """As keys."""
        return self.keys(x, layer)

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        """8: the scale is shared by everything."""
        return 8.0


@dataclass(frozen=True)
class Bf16:
    """bfloat16, what a cache of most models is."""

    pre_rope: bool = False

    def keys(self, x: Tensor, layer: int) -> Tensor:
        """[B, H, S, D] -> the same, rounded."""
        return x.bfloat16().float()

    def values(self, x: Tensor, layer: int) -> Tensor:
        """As keys."""
        return self.keys(x, layer)

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        """16."""
        return 16.0


@dataclass(frozen=True)
class RoundTrip:
    """A recipe that needs no calibration; an incomplete last unit of tokens stays exact, as in its
    cache, but nothing else does: windows and sinks are left out, as no codec here has any.
    """

    recipe: Recipe

    @property
    def pre_rope(self) -> bool:
        """As the recipe."""
        return self.recipe.pre_rope

    def keys(self, x: Tensor, layer: int) -> Tensor:
        """[B, H, S, D] -> the same, as read back."""
        return _round_trip(self.recipe.keys, x)

    def values(self, x: Tensor, layer: int) -> Tensor:
        """As keys."""
        return _round_trip(self.recipe.values, x)

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        """Mean of the keys' and the values'."""
        recipe = self.recipe
        return (recipe.keys.effective_bits(dim) + recipe.values.effective_bits(dim)) / 2


def _round_trip(codec: Codec, x: Tensor) -> Tensor:
    whole = x.shape[2] // codec.tokens * codec.tokens
    units = x[:, :, :whole].float().unflatten(2, (-1, codec.tokens))
    read = codec.decode(codec.encode(units, ()), ()).flatten(2, 3)
    return torch.cat([read, x[:, :, whole:].float()], 2)


@dataclass(frozen=True, eq=False)
class KVQuantReleased:
    """KVQuant as its code was released (arXiv 2401.18079): what its users measure.

    Keys before RoPE: per-channel thresholds at the 0.5 and 99.5 percentiles of calibration, one
    k-means table per layer weighted by squared gradients without the s^2 of equation 7, elements
    beyond the thresholds exact. Values: per token over all heads, the 0.5 % largest and smallest
    exact. The first token exact.
    """

    bits: int
    key_low: Mapping[int, Tensor]
    key_high: Mapping[int, Tensor]
    key_table: Mapping[int, Tensor]
    value_table: Mapping[int, Tensor]
    share: float = 0.01
    pre_rope: bool = True

    @staticmethod
    def fit(observed: Mapping[int, Observed], bits: int, share: float = 0.01) -> KVQuantReleased:
        """Calibrate on observed keys and values."""
        low, high, keys, values = {}, {}, {}, {}
        for index, seen in observed.items():
            k, v = seen.keys.float(), seen.values.float()
            low[index], high[index] = percentiles(k[:, seen.places > 0], share)
            x = _normalise(k, low[index][:, None], high[index][:, None])
            keys[index] = inlier_levels(x, seen.key_gradients, bits)
            flat = v.transpose(0, 1).flatten(1)
            bounds = percentiles(flat, share)
            y = _normalise(flat, bounds[0][:, None], bounds[1][:, None])
            gradient = seen.value_gradients
            weight = None if gradient is None else gradient.transpose(0, 1).flatten(1)
            values[index] = inlier_levels(y, weight, bits)
        return KVQuantReleased(bits, low, high, keys, values, share)

    def keys(self, x: Tensor, layer: int) -> Tensor:
        """[B, H, S, D] before RoPE."""
        low, high = self.key_low[layer][:, None], self.key_high[layer][:, None]
        return self._round(x.float(), low, high, self.key_table[layer])

    def values(self, x: Tensor, layer: int) -> Tensor:
        """[B, H, S, D]; one range per token over all heads."""
        flat = x.float().transpose(1, 2).flatten(2)
        low, high = (q.unsqueeze(-1) for q in percentiles(flat, self.share, -1))
        inside = (flat > low) & (flat < high)
        kept = torch.where(inside, flat, flat.median(-1, keepdim=True).values)
        low, high = kept.amin(-1, keepdim=True), kept.amax(-1, keepdim=True)
        out = self._round(flat, low, high, self.value_table[layer])
        return out.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        """The paper's accounting (appendix M): 32 bits per outlier, pointers and scales."""
        return self.bits + 32 * self.share + 32 / (heads * dim) + 16 / tokens

    def _round(self, x: Tensor, low: Tensor, high: Tensor, table: Tensor) -> Tensor:
        outside = (x < low) | (x > high)
        outside[..., :1, :] = True
        half, middle = (high - low).clamp(min=1e-8) / 2, (high + low) / 2
        y = (x - middle) / half
        codes = torch.bucketize(y.contiguous(), (table[1:] + table[:-1]) / 2)
        return torch.where(outside, x, table[codes] * half + middle)


def _normalise(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (x - (high + low) / 2) / ((high - low).clamp(min=1e-8) / 2)
