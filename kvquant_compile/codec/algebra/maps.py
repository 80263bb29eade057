"""Invertible maps of channels: they spread or level outliers before a codec, and store nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.base import Constants, Map, Sample
from kvquant_compile.codec.algebra.checks import check


@dataclass(frozen=True)
class Hadamard(Map):
    """The normalised Walsh-Hadamard transform; its own inverse (QuaRot, RotateKV).

    Blocks are as large a power of two as the channels allow.

    Attributes:
        heads: neighbouring kv heads that are mixed; fewer where the model's number of heads is
            no multiple.
    """

    heads: int = 1

    def apply(self, x: Tensor, constants: Constants) -> Tensor:
        """Butterflies, hence the same bits whatever else is in the batch."""
        joint = math.gcd(self.heads, x.shape[1])
        y = join_heads(x, joint)
        width = y.shape[-1]
        size = width & -width
        y = y.unflatten(-1, (-1, size))
        step = 1
        while step < size:
            a, b = y.unflatten(-1, (-1, 2, step)).unbind(-2)
            y = torch.stack([a + b, a - b], -2).flatten(-3)
            step *= 2
        return split_heads((y * size**-0.5).flatten(-2), joint)

    def undo(self, y: Tensor, constants: Constants) -> Tensor:
        """The transform again."""
        return self.apply(y, constants)


@dataclass(frozen=True)
class Rotation(Map):
    """A random orthogonal matrix, one for all heads.

    Attributes:
        seed: added to the calibration's.
    """

    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The matrix, float64 [D, D]."""
        return ("matrix",)

    def fit(self, sample: Sample) -> Constants:
        """Q of a Gaussian matrix, signs fixed."""
        dim = sample.x.shape[-1]
        generator = torch.Generator().manual_seed(sample.seed + self.seed)
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        return ((q * r.diagonal().sign()).to(sample.x.device),)

    def apply(self, x: Tensor, constants: Constants) -> Tensor:
        """In float64, so that the bits do not depend on the batch."""
        return (x.double() @ constants[0]).float()

    def undo(self, y: Tensor, constants: Constants) -> Tensor:
        """By the transpose."""
        return (y.double() @ constants[0].T).float()


@dataclass(frozen=True)
class Interleave(Map):
    """Channels i, i + ways, i + 2 ways, ... become neighbours ("non-contiguous" groups).

    Attributes:
        ways: the distance; a divisor of the channels.
    """

    ways: int = 4

    def apply(self, x: Tensor, constants: Constants) -> Tensor:
        """A transposition of the channels seen as a matrix."""
        check(x.shape[-1] % self.ways == 0, str(self), f"heads have {x.shape[-1]} channels")
        return x.unflatten(-1, (-1, self.ways)).transpose(-1, -2).flatten(-2)

    def undo(self, y: Tensor, constants: Constants) -> Tensor:
        """The transposition back."""
        return y.unflatten(-1, (self.ways, -1)).transpose(-1, -2).flatten(-2)


@dataclass(frozen=True)
class Reorder(Map):
    """Channels of all heads by rising mean magnitude, so that like share a scale (RotateKV)."""

    uses_data: ClassVar[bool] = True

    @property
    def names(self) -> tuple[str, ...]:
        """The order, int64 [H D], and its inverse."""
        return "order", "back"

    def fit(self, sample: Sample) -> Constants:
        """Sort the calibration tokens' mean magnitudes."""
        order = sample.x.abs().mean(1).flatten().argsort(stable=True)
        return order, order.argsort()

    def apply(self, x: Tensor, constants: Constants) -> Tensor:
        """Gather across heads."""
        return split_heads(join_heads(x, x.shape[1])[..., constants[0]], x.shape[1])

    def undo(self, y: Tensor, constants: Constants) -> Tensor:
        """Gather back."""
        return split_heads(join_heads(y, y.shape[1])[..., constants[1]], y.shape[1])


@dataclass(frozen=True)
class ChannelScale(Map):
    """Divide every channel by a power of its own static size (SmoothAttention: absmax to 0.5).

    Attributes:
        power: of the size.
        stat: "absmax" or "std".
        tied: channels that RoPE turns together share the larger size; the map then commutes with
            RoPE and could be folded into the query's projection.
    """

    power: float = 1.0
    stat: str = "absmax"
    tied: bool = False
    uses_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.stat in ("absmax", "std"), f"ChannelScale(stat={self.stat!r})",
              "it is absmax or std")  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        """The divisor, float32 [H, D]."""
        return ("scale",)

    def fit(self, sample: Sample) -> Constants:
        """Sizes of the calibration tokens; 1 for channels that are always 0."""
        size = sample.x.abs().amax(1) if self.stat == "absmax" else sample.x.std(1)
        if self.tied and sample.pairs:
            first, second = torch.tensor(sample.pairs, device=size.device).unbind(1)
            larger = torch.maximum(size[:, first], size[:, second])
            size[:, first], size[:, second] = larger, larger
        scale = size.clamp_min(1e-6) ** self.power
        return (torch.where(size > 0, scale, torch.ones_like(size)),)

    def apply(self, x: Tensor, constants: Constants) -> Tensor:
        """Divide."""
        return x / constants[0][:, None, None]

    def undo(self, y: Tensor, constants: Constants) -> Tensor:
        """Multiply."""
        return y * constants[0][:, None, None]


@dataclass(frozen=True)
class Centre(Map):
    """Subtract every channel's static mean. Affine rather than linear; keys have large means."""

    uses_data: ClassVar[bool] = True

    @property
    def names(self) -> tuple[str, ...]:
        """The mean, float32 [H, D]."""
        return ("mean",)

    def fit(self, sample: Sample) -> Constants:
        """Means of the calibration tokens."""
        return (sample.x.mean(1),)

    def apply(self, x: Tensor, constants: Constants) -> Tensor:
        """Subtract."""
        return x - constants[0][:, None, None]

    def undo(self, y: Tensor, constants: Constants) -> Tensor:
        """Add."""
        return y + constants[0][:, None, None]


def join_heads(x: Tensor, heads: int) -> Tensor:
    """[B, H, U, T, D] -> [B, H / heads, U, T, heads * D]."""
    if heads == 1:
        return x
    return x.unflatten(1, (-1, heads)).movedim(2, 4).flatten(-2)


def split_heads(y: Tensor, heads: int) -> Tensor:
    """Inverse of :func:`join_heads`."""
    if heads == 1:
        return y
    return y.unflatten(-1, (heads, -1)).movedim(4, 2).flatten(1, 2)
