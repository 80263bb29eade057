"""Tables of the keys that are rotated token by token, in the words that :mod:`.explicit` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.lowering.gluon.spec import EXPLICIT_EXPONENT, GluonSpec
from kvquant_compile.lowering.triton.prepared import half_words
from kvquant_compile.lowering.triton.spec import table_bias

SUBNORMAL = 2.0**-24
"""A byte 1 as half a word with nothing above it."""

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
    """Cosines and sines of the tokens' offsets from the middle of their page.

    Attributes:
        cos, sin: float64 [chunk, tile, explicit groups, 32 lanes, 2 halves, R, 2 low]: R is 1 where
            a lane's two tokens share them.
    """

    spec: GluonSpec
    cos: Tensor
    sin: Tensor

    @staticmethod
    def make(spec: GluonSpec, frequencies: Tensor) -> Turns:
        """From float64 [P], radians a position."""
        chunk, tile, lane, r = torch.meshgrid(
            torch.arange(2), torch.arange(2), torch.arange(32),
            torch.arange(1 if spec.neighbours else 2), indexing="ij",
        )  # fmt: skip
        offset = 32 * chunk + 4 * (lane // 4) + 2 * tile + r - 32
        angle = offset[:, :, None, :, None, :, None] * frequencies[_pairs(spec)]
        return Turns(spec, angle.cos(), angle.sin())

    def words(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The rotation section.

        Args:
            scale: float64 [H, 2 P], over the head's unit.
            zero: float64 [H, 2 P], in steps of the scale.

        Returns:
            int32 [H, chunk, tile, group, vector, lane, 4].
        """
        if self.spec.neighbours:
            return self._affine(scale, zero)
        both = torch.stack([half_words(*x.unbind(-1)) for x in (self.cos, self.sin)], 3)
        return both.flatten(-2).expand(scale.shape[0], *both.shape[:-2], 4)

    def _affine(self, scale: Tensor, zero: Tensor) -> Tensor:
        over = pair_scale(scale).repeat(1, 2)
        a, b = (x * SMALL / SUBNORMAL for x in self._members(scale / over))
        same_a, cross_b = _halves(a * self.cos), _halves(-b * self.sin)
        cross_a, same_b = _halves(a * self.sin), _halves(b * self.cos)
        bias = table_bias(self.spec.layout.spec.key_bits) * SUBNORMAL
        meant = self._turned(0 * scale if self.spec.scaled else scale * zero / over)
        c = meant[0] - bias * (same_a + cross_b)
        d = meant[1] - bias * (cross_a + same_b)
        factors = torch.stack([same_a, cross_b, cross_a, same_b, c, d], 4)
        words = half_words(*factors.squeeze(-2).unbind(-1)).unflatten(4, (3, 2))
        return words.transpose(-3, -2).flatten(-2)  # head, .., vector, lane, (factor, half)

    def zeros(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The zeros section, fragments of ``R(i) zero``: int32 [H, ...]."""
        if self.spec.neighbours:
            zero = zero / pair_scale(scale).repeat(1, 2)
        words = [half_words(*x.unbind(-1)) for x in self._turned(scale * zero)]
        both = torch.stack(words, 4)  # head, chunk, tile, group, member, lane, half, R
        if self.spec.neighbours:  # rows of a product are two tiles'
            both = both.squeeze(-1).movedim(2, -1)
        return both.flatten(-2)

    def _turned(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Both members of ``R(i) key``, as small as turned keys are."""
        a, b = (x * SMALL for x in self._members(key))
        return a * self.cos - b * self.sin, a * self.sin + b * self.cos

    def _members(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of float64 [H, 2 P], by the places of a table."""
        pair = _pairs(self.spec)
        a, b = (x[:, member * self.spec.pairs + pair][:, None, None] for member in range(2))
        return a, b


def _pairs(spec: GluonSpec) -> Tensor:
    """int64 [explicit groups, 32 lanes, 2 halves, 1, 2 low]."""
    return fragment_pairs(spec.explicit)[:, torch.arange(32) % 4][:, :, :, None]


def _halves(x: Tensor) -> Tensor:
    """As the kernel has them."""
    return x.half().double()
