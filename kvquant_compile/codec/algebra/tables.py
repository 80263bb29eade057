"""Codes that calibration finds the levels of: scalar tables, and vector codebooks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.base import Codec, Constants, Sample
from kvquant_compile.codec.algebra.checks import check
from kvquant_compile.codec.algebra.codebook import fit_codebook, nearest_entries
from kvquant_compile.codec.algebra.compose import Sum
from kvquant_compile.codec.algebra.lloyd import lloyd_levels
from kvquant_compile.codec.algebra.parts import Part, Parts, code_part


@dataclass(frozen=True)
class Lut(Codec):
    """The nearest of ``2**bits`` levels, a table per head (KVQuant's NUQ, unweighted).

    Elements beyond the ends become the ends, infinities too; a NaN becomes the last level.
    Put a :class:`Normalise` or static scales before it.

    Attributes:
        bits: width of a code, 1..8.
    """

    bits: int
    uses_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(1 <= self.bits <= 8, f"Lut(bits={self.bits})", "codes take 1 to 8 bits")

    @property
    def names(self) -> tuple[str, ...]:
        """The table, float32 [H, 2**bits], ascending."""
        return ("table",)

    def fit(self, sample: Sample) -> Constants:
        """K-means of every head's calibration tokens."""
        rows = [lloyd_levels(head.flatten(), None, 2**self.bits) for head in sample.x]
        return (torch.stack(rows),)

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """The codes."""
        return (code_part("codes", self.bits, tokens, dim),)

    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """Places among the midpoints."""
        table = constants[0]
        middle = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
        by_head = x.transpose(0, 1)
        codes = torch.searchsorted(middle, by_head.flatten(1).contiguous(), right=True)
        return (codes.view(by_head.shape).transpose(0, 1).to(torch.uint8),)

    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """Look levels up."""
        by_head = parts[0].transpose(0, 1)
        levels = constants[0].gather(1, by_head.flatten(1).long())
        return levels.view(by_head.shape).transpose(0, 1)


@dataclass(frozen=True)
class Vq(Codec):
    """The nearest of some vectors for every group of neighbouring channels.

    One codebook for all groups and heads. ``repeated(Vq(), 8)`` is residual vector quantisation.
    Codes of a token do not depend on the batch except where two entries are equally near up to
    float32 rounding.

    Attributes:
        entries: vectors in the codebook, a power of two up to 65536.
        dim: channels of a vector; for heads that are no multiple, their common divisor.
        steps: moving-average steps of the fit.
    """

    entries: int = 2048
    dim: int = 32
    steps: int = 50
    uses_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole = self.entries & (self.entries - 1) == 0 and 2 <= self.entries <= 1 << 16
        check(whole, f"Vq(entries={self.entries})", "it is a power of two from 2 to 65536")

    @property
    def names(self) -> tuple[str, ...]:
        """The codebook, float32 [entries, dim]."""
        return ("codebook",)

    def fit(self, sample: Sample) -> Constants:
        """K-means, then an exponential moving average over batches."""
        vectors = self._vectors(sample.x).flatten(0, -2)
        return (fit_codebook(vectors, self.entries, self.steps, sample.generator()),)

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """An index a group."""
        groups = dim // math.gcd(self.dim, dim)
        return (code_part("index", (self.entries - 1).bit_length(), tokens, groups),)

    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """Nearest in Euclidean distance."""
        return (nearest_entries(self._vectors(x), constants[0]),)

    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """Look vectors up."""
        return constants[0][parts[0].long()].flatten(-2)

    def _vectors(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, math.gcd(self.dim, x.shape[-1])))


def repeated(codec: Codec, count: int) -> Sum:
    """``codec + codec + ...``, ``count`` terms: residual coding, each term fitted on its own."""
    check(count > 0, f"repeated(..., {count})", "there is at least one term")
    return Sum((codec,) * count)
