"""What a codec stores: named arrays, and their bytes.

Neighbouring arrays of one width are packed as one, so that less than a byte a run is lost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.pack import pack_codes, packed_bytes, unpack_codes

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Part:
    """One stored array of one head and unit.

    Attributes:
        name: for people.
        shape: without the leading [B, H, U].
        bits: of an element.
        dtype: of the tensor; integers are codes below ``2**bits``, floats are stored as they are.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    dtype: torch.dtype = torch.uint8

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def float16_part(name: str, *shape: int) -> Part:
    """A part of float16 numbers."""
    return Part(name, shape, 16, torch.float16)


def code_part(name: str, bits: int, *shape: int) -> Part:
    """A part of codes below ``2**bits``."""
    return Part(name, shape, bits, torch.uint8 if bits <= 8 else torch.int32)


@dataclass(frozen=True)
class Run:
    """Neighbouring parts of one width and kind."""

    parts: tuple[Part, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return sum(part.count for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Whole bytes."""
        return packed_bytes(self.count, self.parts[0].bits)


def runs(parts: Sequence[Part]) -> list[Run]:
    """Parts that share bytes, together."""
    groups = itertools.groupby(parts, key=lambda part: (part.bits, part.dtype))
    return [Run(tuple(group)) for _, group in groups]


def pack_parts(parts: Sequence[Part], data: Parts) -> Tensor:
    """Arrays [..., *shape] of every part -> uint8 [..., bytes]."""
    out, at = [], 0
    for run in runs(parts):
        arrays = zip(run.parts, data[at : at + len(run.parts)], strict=True)
        flat = torch.cat([_flat(part, x) for part, x in arrays], -1)
        if flat.dtype.is_floating_point:
            out.append(flat.contiguous().view(torch.uint8))
        else:
            out.append(pack_codes(flat, run.parts[0].bits))
        at += len(run.parts)
    return torch.cat(out, -1)


def unpack_parts(parts: Sequence[Part], data: Tensor) -> Parts:
    """Inverse of :func:`pack_parts`."""
    out: list[Tensor] = []
    at = 0
    for run in runs(parts):
        mine, first = data[..., at : at + run.nbytes], run.parts[0]
        if first.dtype.is_floating_point:
            # A clone, because a slice may be contiguous and yet begin at an odd byte.
            flat = mine.clone(memory_format=torch.contiguous_format).view(first.dtype)
        else:
            flat = unpack_codes(mine, first.bits, run.count)
        pieces = flat.split([part.count for part in run.parts], -1)
        shapes = [(*data.shape[:-1], *part.shape) for part in run.parts]
        out += [x.reshape(shape) for x, shape in zip(pieces, shapes, strict=True)]
        at += run.nbytes
    return tuple(out)


def _flat(part: Part, x: Tensor) -> Tensor:
    return x.reshape(*x.shape[: x.ndim - len(part.shape)], part.count).to(part.dtype)
