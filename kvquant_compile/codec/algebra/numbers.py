"""Float16 parameters of a code, and elements in rows that share them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.codec.slots import FLOAT16_MAX, to_float16

__all__ = ["FLOAT16_MAX", "as_rows", "nonzero", "saturated", "to_float16"]

AXES = ("token", "channel")


def as_rows(x: Tensor, axis: str) -> Tensor:
    """[..., T, D] with the elements that share a parameter last: channels of a token, or tokens
    of a channel. Its own inverse."""
    return x if axis == "token" else x.transpose(-1, -2)


def nonzero(x: Tensor) -> Tensor:
    """``x`` with ones where it is zero, to divide by."""
    return torch.where(x == 0, torch.ones_like(x), x)


def saturated(x: Tensor) -> Tensor:
    """Finite values within float16's range; infinities and NaN stay."""
    return torch.where(x.isinf(), x, x.clamp(-FLOAT16_MAX, FLOAT16_MAX))
