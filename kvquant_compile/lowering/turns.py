"""Tables that keys are rotated by, token by token, in the words that kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.lowering.half_words import SUBNORMAL, half_words

EXPLICIT_EXPONENT = 9
"""Explicitly rotated keys are 2**9 times smaller, their queries larger, to stay normal halves."""

SMALL = 2.0**-EXPLICIT_EXPONENT
"""What turned keys are smaller by."""


def fragment_pairs(groups: int) -> Tensor:
    """Pair of (group, t, half, low): int64 [groups, 4, 2, 2]."""
    u, t, half, low = torch.meshgrid(*(torch.arange(n) for n in (groups, 4, 2, 2)), indexing="ij")
    return 16 * u + 8 * half + 2 * t + low


def pair_scale(scale: Tensor) -> Tensor:
    """The least power of two that neither member's scale exceeds: [H, 2 P] -> [H, P].

    Not below what keys are smaller by, so that residuals over it stay finite halves.
    """
    larger = scale.unflatten(-1, (2, -1)).amax(-2)
    return torch.exp2(torch.ceil(torch.log2(larger.clamp_min(SMALL))))


@dataclass(frozen=True, eq=False)
class Turns:
    """Cosines and sines of the tokens' offsets from the middle of their page, and what they make of
    scales and zeros (float64 [H, 2 P]; scales over the head's unit, zeros in steps of the scale).

    Attributes:
        cos, sin: float64 [chunk, tile, explicit groups, 32 lanes, 2 halves, R, 2 low]: R is 1 where
            a lane's two tokens share them.
    """

    cos: Tensor
    sin: Tensor

    @staticmethod
    def make(frequencies: Tensor, groups: int, *, neighbours: bool) -> Turns:
        """Of the first groups of sixteen pairs, from float64 [P], radians a position."""
        chunk, tile, lane, r = torch.meshgrid(
            torch.arange(2), torch.arange(2), torch.arange(32),
            torch.arange(1 if neighbours else 2), indexing="ij",
        )  # fmt: skip
        offset = 32 * chunk + 4 * (lane // 4) + 2 * tile + r - 32
        angle = offset[:, :, None, :, None, :, None] * frequencies[_lane_pairs(groups)]
        return Turns(angle.cos(), angle.sin())

    @property
    def neighbours(self) -> bool:
        """Whether a lane's two tokens share rotations."""
        return self.cos.shape[5] == 1

    def circle(self) -> Tensor:
        """int32 [chunk, tile, group, (cosine, sine), lane, 2 R]."""
        both = torch.stack([half_words(*x.unbind(-1)) for x in (self.cos, self.sin)], 3)
        return both.flatten(-2)

    def affine(self, scale: Tensor, zero: Tensor, bias: int) -> Tensor:
        """Factors A, B and constants C, D that turn bytes u, v into a turned pair, over a power of
        two of the pair: ``u A cos - v B sin + C``, ``u A sin + v B cos + D``. Of neighbours.

        Args:
            bias: what a byte is larger by than what it means.

        Returns:
            int32 [H, chunk, tile, group, 3, lane, 4]: vectors A cos, -B sin; A sin, B cos; C, D.
        """
        over = pair_scale(scale).repeat(1, 2)
        a, b = (x * SMALL / SUBNORMAL for x in self._members(scale / over))
        same_a, cross_b = _halves(a * self.cos), _halves(-b * self.sin)
        cross_a, same_b = _halves(a * self.sin), _halves(b * self.cos)
        meant = self._turned(scale * zero / over)
        c = meant[0] - bias * SUBNORMAL * (same_a + cross_b)
        d = meant[1] - bias * SUBNORMAL * (cross_a + same_b)
        factors = torch.stack([same_a, cross_b, cross_a, same_b, c, d], 4)
        words = half_words(*factors.squeeze(-2).unbind(-1)).unflatten(4, (3, 2))
        return words.transpose(-3, -2).flatten(-2)  # head, .., vector, lane, (factor, half)

    def zeros(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Fragments of turned zeros: int32 [H, chunk, tile, group, member, lane, 4], or of
        neighbours, where the rows of a product are two tiles', [H, chunk, group, member, lane, 4].
        """
        if self.neighbours:
            zero = zero / pair_scale(scale).repeat(1, 2)
        words = [half_words(*x.unbind(-1)) for x in self._turned(scale * zero)]
        both = torch.stack(words, 4)  # head, chunk, tile, group, member, lane, half, R
        if self.neighbours:
            both = both.squeeze(-1).movedim(2, -1)
        return both.flatten(-2)

    def _turned(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Both members of the turned key, as small as turned keys are."""
        a, b = (x * SMALL for x in self._members(key))
        return a * self.cos - b * self.sin, a * self.sin + b * self.cos

    def _members(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of float64 [H, 2 P], by the places of a table."""
        pair = _lane_pairs(self.cos.shape[2])
        a, b = (x[:, member * (x.shape[1] // 2) + pair][:, None, None] for member in range(2))
        return a, b


def _lane_pairs(groups: int) -> Tensor:
    """int64 [groups, 32 lanes, 2 halves, 1, 2 low]."""
    return fragment_pairs(groups)[:, torch.arange(32) % 4][:, :, :, None]


def _halves(x: Tensor) -> Tensor:
    """As kernels have them."""
    return x.half().double()
