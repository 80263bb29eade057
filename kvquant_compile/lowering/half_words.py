"""Halves in words, and what a byte is as a half."""

from __future__ import annotations

import torch
from torch import Tensor

SUBNORMAL = 2.0**-24
"""A byte 1 as half a word with nothing above it."""

BYTES_FROM, BYTES_AS_1024 = 1024, 0x64646464
"""Below the high byte 0x64 a byte u is the float16 1024 + u."""


def half_words(low: Tensor, high: Tensor) -> Tensor:
    """Two float tensors as float16 pairs in int32 words."""
    both = torch.stack([low, high], -1).to(torch.float16).contiguous()
    return both.view(torch.int32).squeeze(-1)
