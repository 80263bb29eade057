"""Evenly spaced levels between the ends of a group of elements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.base import Codec, Constants
from kvquant_compile.codec.algebra.checks import check
from kvquant_compile.codec.algebra.numbers import AXES, as_rows, nonzero, saturated, to_float16
from kvquant_compile.codec.algebra.parts import Part, Parts, code_part, float16_part

_ZERO_STEPS = 127
_SCALE_STEPS = 255


@dataclass(frozen=True)
class Affine(Codec):
    """Round to nearest between minimum and maximum, or symmetric about zero.

    Finite ranges beyond float16 saturate; a NaN or an infinity makes its whole group NaN.

    Attributes:
        bits: width of a code, 1..8.
        axis: "token": channels of one token share a scale; "channel": tokens of one channel do.
        group: how many share it; 0 for all channels of a head.
        symmetric: no zero point is stored; the levels are odd multiples of half a step.
        clip: part of the range that the levels span.
        two_level: scales and zero points as bytes, in float16 units per token.
    """

    bits: int
    axis: str = "token"
    group: int = 0
    symmetric: bool = False
    clip: float = 1.0
    two_level: bool = False

    def __post_init__(self) -> None:
        check(1 <= self.bits <= 8, f"Affine(bits={self.bits})", "codes take 1 to 8 bits")
        check(self.axis in AXES, f"Affine(axis={self.axis!r})", f"it is one of {AXES}")
        per_channel = self.axis == "channel"
        check(
            self.group > 0 or not per_channel,
            "Affine(axis='channel') without a group",
            "tokens keep coming, so the number that share a scale must be given",
        )
        check(
            not (per_channel and self.two_level),
            "Affine(axis='channel', two_level=True)",
            "the second level is shared by the groups of a token",
        )

    @property
    def tokens(self) -> int:
        """The group, where it runs over tokens."""
        return self.group if self.axis == "channel" else 1

    @property
    def levels(self) -> int:
        """Steps between the first and the last level."""
        return 2**self.bits - 1

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """Codes and one scale (and zero point) a group."""
        rows, row = (tokens, dim) if self.axis == "token" else (dim, tokens)
        groups = -(-row // (self.group or row))
        codes = code_part("codes", self.bits, tokens, dim)
        kinds = ("scale",) if self.symmetric else ("scale", "zero")
        if not self.two_level:
            return (codes, *(float16_part(kind, rows, groups) for kind in kinds))
        bytes_ = (code_part(kind, 8, rows, groups) for kind in kinds)
        return (codes, *bytes_, *(float16_part(f"{kind} unit", rows, 1) for kind in kinds))

    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """See :class:`Affine`."""
        low, high = self._ends(as_rows(x, self.axis))
        if self.symmetric:
            ends = torch.maximum(low.abs(), high.abs())
            low, high = -ends, ends
        stored: Parts
        if self.two_level:
            stored = self._two_levels(low, high)
        else:
            stored = (to_float16((high - low) / self.levels), to_float16(low))
        if self.symmetric:
            stored = stored[::2]
        scale, zero = self._parameters(stored, x)
        codes = ((x - zero) / nonzero(scale)).round_().clamp_(0, self.levels)
        return (torch.nan_to_num(codes, nan=0.0).to(torch.uint8), *stored)

    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """``code * scale + zero``."""
        codes = parts[0].float()
        scale, zero = self._parameters(parts[1:], codes)
        return codes.mul_(scale).add_(zero)

    def error_bound(self, x: Tensor, constants: Constants = ()) -> Tensor:
        """Largest error of every element of finite tokens [..., T, D] within float16's range.

        Half a step, what clipping cuts off, and the rounding of scale and zero point.
        """
        low, high = self._ends(as_rows(x.float(), self.axis), clip=1.0)
        reach = torch.maximum(low.abs(), high.abs())
        span = 2 * reach if self.symmetric else high - low
        rounding = 2.0**-11 * (reach + span) + 2.0**-24 * self.levels
        if self.two_level:
            row = span.amax(-1, keepdim=True), reach.amax(-1, keepdim=True)
            rounding = rounding + row[0] / _SCALE_STEPS + row[1] / _ZERO_STEPS
        bound = span / (2 * self.levels) + (1 - self.clip) * reach + rounding
        return as_rows(self._spread(bound, as_rows(x, self.axis).shape[-1]), self.axis)

    def _ends(self, rows: Tensor, clip: float | None = None) -> tuple[Tensor, Tensor]:
        """Lowest and highest element [..., R, G] of every group of rows [..., R, n], clipped."""
        clip = self.clip if clip is None else clip
        length = rows.shape[-1]
        parts = rows.split(self.group or length, -1)
        if length % (self.group or length) == 0:
            low, high = torch.aminmax(rows.unflatten(-1, (len(parts), -1)), dim=-1)
        else:
            low = torch.stack([part.amin(-1) for part in parts], -1)
            high = torch.stack([part.amax(-1) for part in parts], -1)
        return saturated(low) * clip, saturated(high) * clip

    def _two_levels(self, low: Tensor, high: Tensor) -> Parts:
        """Byte scales and zero points, rounded outwards, and their float16 units."""
        zero_unit = to_float16(low.abs().amax(-1, keepdim=True))
        steps = (low / nonzero(zero_unit.float()) * _ZERO_STEPS).floor_()
        zero = torch.nan_to_num(steps).clamp_(-_ZERO_STEPS - 1, _ZERO_STEPS)
        step = (high - zero / _ZERO_STEPS * zero_unit.float()) / self.levels
        unit = to_float16(step.amax(-1, keepdim=True))
        steps = (step / nonzero(unit.float()) * _SCALE_STEPS).ceil_()
        scale = torch.nan_to_num(steps).clamp_(0, _SCALE_STEPS)
        code = (zero + _ZERO_STEPS + 1).to(torch.uint8)
        return scale.to(torch.uint8), code, unit, zero_unit

    def _parameters(self, stored: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every element of ``x`` [..., T, D]."""
        numbers = [part.float() for part in stored]
        if self.two_level:
            half = len(numbers) // 2
            shares = [numbers[0] / _SCALE_STEPS]
            if not self.symmetric:
                shares.append((numbers[1] - (_ZERO_STEPS + 1)) / _ZERO_STEPS)
            numbers = [share * unit for share, unit in zip(shares, numbers[half:], strict=True)]
        length = x.shape[-1] if self.axis == "token" else x.shape[-2]
        spread = [as_rows(self._spread(n, length), self.axis) for n in numbers]
        if self.symmetric:
            return spread[0], spread[0] * (-self.levels / 2)
        return spread[0], spread[1]

    def _spread(self, groups: Tensor, length: int) -> Tensor:
        """One number a group [..., R, G] to every element [..., R, length]."""
        group = self.group or length
        return groups.repeat_interleave(group, -1)[..., :length] if group > 1 else groups
