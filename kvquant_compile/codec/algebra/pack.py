"""Codes of any width as bytes, little end first: no bit between two codes is left out."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 16


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes below ``2**bits``, integers [..., n] -> uint8 [..., packed_bytes(n, bits)]."""
    if bits == 8:
        return codes.to(torch.uint8)
    width = bits
    if 8 % bits:  # bit by bit
        shifts = torch.arange(bits, device=codes.device, dtype=torch.int32)
        codes = (codes.to(torch.int32)[..., None] >> shifts & 1).flatten(-2)
        width = 1
    each = 8 // width
    codes = codes.to(torch.uint8)
    missing = -codes.shape[-1] % each
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    parts = codes.unflatten(-1, (-1, each)).unbind(-1)
    out = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        out |= part << (i * width)
    return out


def unpack_codes(data: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_codes`: uint8 [..., bytes] -> integers [..., count], uint8 up to
    8 bits and int32 above."""
    if bits == 8:
        return data
    width = 1 if 8 % bits else bits
    mask = 2**width - 1
    parts = torch.stack([data >> shift & mask for shift in range(0, 8, width)], -1).flatten(-2)
    if width == bits:
        return parts[..., :count]
    digits = parts[..., : count * bits].unflatten(-1, (count, bits))
    dtype = torch.uint8 if bits < 8 else torch.int32
    out = torch.zeros(digits.shape[:-1], dtype=dtype, device=data.device)
    for i, digit in enumerate(digits.unbind(-1)):
        out |= digit.to(dtype) << i
    return out
