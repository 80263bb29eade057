"""Published codecs to compare with, as round trips; sources in each docstring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.calib.fit_published import inlier_levels, percentiles
from kvquant_compile.calib.observe import Observed

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
class IntPerToken:
    """Asymmetric round-to-nearest per (token, head), float16 scale and zero, after RoPE.

    With ``group`` channels to a scale instead of the whole head, if not 0.
    """

    bits: int
    group: int = 0
    pre_rope: bool = False

    def keys(self, x: Tensor, layer: int) -> Tensor:
        """[B, H, S, D] -> the same, rounded."""
        parts = x.split(self.group or x.shape[-1], -1)
        return torch.cat([round_asymmetric(part, self.bits, -1) for part in parts], -1)

    def values(self, x: Tensor, layer: int) -> Tensor:
        """As keys."""
        return self.keys(x, layer)

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        """Codes and 32 bits of scale and zero per group."""
        return self.bits + 32 / min(self.group or dim, dim)


@dataclass(frozen=True)
class Kivi:
    """KIVI (arXiv 2402.02750): keys per channel in groups of tokens, values per token in groups
    of channels, asymmetric, after RoPE. No full-precision window, as nothing here has one.
    """

    bits: int
    group: int = 64
    pre_rope: bool = False

    def keys(self, x: Tensor, layer: int) -> Tensor:
        """[B, H, S, D]; the last group may be shorter."""
        return torch.cat(
            [round_asymmetric(part, self.bits, -2) for part in x.split(self.group, -2)], -2
        )

    def values(self, x: Tensor, layer: int) -> Tensor:
        """[B, H, S, D]."""
        return torch.cat(
            [round_asymmetric(part, self.bits, -1) for part in x.split(self.group, -1)], -1
        )

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        """Codes and 32 bits of scale and zero per group."""
        return self.bits + 16 / self.group + 16 / min(self.group, dim)


def round_asymmetric(x: Tensor, bits: int, axis: int) -> Tensor:
    """Uniform levels between the minimum and the maximum along an axis, float16 parameters."""
    x = x.float()
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float()
    zero = low.half().float()
    codes = ((x - zero) / step.clamp(min=1e-8)).round().clamp(0, 2**bits - 1)
    return codes * step + zero


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
            sample = seen.keys[:, seen.places > 0]
            low[index], high[index] = percentiles(sample, share)
            x = _normalise(seen.keys, low[index][:, None], high[index][:, None])
            keys[index] = inlier_levels(x, seen.key_gradients, bits)
            flat = seen.values.transpose(0, 1).flatten(1)
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
