"""Codecs without a table: 8-bit floats, float16, and low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.base import Codec, Constants, Sample
from kvquant_compile.codec.algebra.checks import check
from kvquant_compile.codec.algebra.numbers import to_float16
from kvquant_compile.codec.algebra.parts import Part, Parts, float16_part

_LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# Floats lose nothing by being far from the largest one.
_HEADROOM = 2.0


@dataclass(frozen=True)
class Fp8(Codec):
    """8-bit floats with one static scale for all; what serving engines call an fp8 cache.

    Finite values beyond the range saturate; infinities become NaN, NaN stays.

    Attributes:
        kind: "e4m3" or "e5m2".
    """

    kind: str = "e4m3"
    uses_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.kind in _DTYPES, f"Fp8(kind={self.kind!r})", f"it is one of {list(_DTYPES)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The scale, float32 []."""
        return ("scale",)

    def fit(self, sample: Sample) -> Constants:
        """The calibration's largest magnitude goes to half of the largest float."""
        largest = sample.x.abs().max().float()
        scale = largest * _HEADROOM / _LARGEST[self.kind]
        return (torch.where(scale > 0, scale, torch.ones_like(scale)),)

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """A byte an element."""
        return (Part("values", (tokens, dim), 8, _DTYPES[self.kind]),)

    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """Scale, saturate, round to nearest even."""
        largest = _LARGEST[self.kind]
        y = (x / constants[0]).clamp(-largest, largest)
        return (torch.where(x.isinf(), torch.nan, y).to(_DTYPES[self.kind]),)

    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """Scale back."""
        return parts[0].float() * constants[0]

    def error_bound(self, x: Tensor, constants: Constants) -> Tensor:
        """Half a unit in the last place of every element in range; subnormals' half step below."""
        digits, smallest = {"e4m3": (3, -9), "e5m2": (2, -16)}[self.kind]
        return torch.maximum(x.abs() * 2.0 ** -(digits + 1), constants[0] * 2.0 ** (smallest - 1))


@dataclass(frozen=True)
class Raw(Codec):
    """Float16, for layers, terms or comparisons that shall be (nearly) exact."""

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """Two bytes an element."""
        return (float16_part("values", tokens, dim),)

    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """Round; finite values beyond the range saturate."""
        return (to_float16(x),)

    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """As stored."""
        return parts[0].float()

    def error_bound(self, x: Tensor, constants: Constants) -> Tensor:
        """Half a unit in the last place."""
        return (x.abs() * 2.0**-11).clamp_min(2.0**-25)


@dataclass(frozen=True)
class LowRank(Codec):
    """A product of two thin float16 factors for every group of tokens (GEAR's error term).

    Attributes:
        rank: columns of the factors.
        group: tokens that share factors.
        iterations: power iterations, from a fixed start.
    """

    rank: int = 2
    group: int = 64
    iterations: int = 3

    def __post_init__(self) -> None:
        check(0 < self.rank <= self.group, str(self), "the rank is 1 to the tokens of a group")

    @property
    def tokens(self) -> int:
        """The group."""
        return self.group

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """Both factors."""
        groups = tokens // self.group
        return (
            float16_part("left", groups, self.group, self.rank),
            float16_part("right", groups, dim, self.rank),
        )

    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """In float64, so that the bits do not depend on the batch; NaN makes a group NaN."""
        rows = x.double().unflatten(-2, (-1, self.group))
        known = rows.nan_to_num(0.0, 0.0, 0.0)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(x.shape[-1], self.rank, generator=generator, dtype=torch.float64)
        right = start.to(x.device).expand(*rows.shape[:-2], -1, -1)
        for _ in range(self.iterations):
            right = _orthonormal(known.mT @ (known @ right))
        return to_float16((rows @ right).float()), to_float16(right.float())

    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """The product."""
        left, right = (part.double() for part in parts)
        return (left @ right.mT).float().flatten(-3, -2)


def _orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``x`` [..., D, r], a zero column staying zero.

    Gram-Schmidt, each column twice: for a few columns a fraction of what a batched QR takes, which
    devices do matrix by matrix.
    """
    columns: list[Tensor] = []
    for column in x.unbind(-1):
        for other in (*columns, *columns):
            column = column - other * (other * column).sum(-1, keepdim=True)
        norm = column.norm(dim=-1, keepdim=True)
        columns.append(column / torch.where(norm > 0, norm, 1.0))
    return torch.stack(columns, -1)
