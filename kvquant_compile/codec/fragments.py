"""Code order inside a page: what a GPU lane loads is its own matrix fragment.

A page holds 64 tokens of one kv head as two chunks of 32 tokens. A *selector* is eight codes of
one lane in the nibbles of a 32-bit word, in the order in which ``mma.m16n8k16`` (keys) and
``mma.m16n8k32`` (values) want their A operand, so that a kernel needs neither shuffles nor
shared memory between load and matrix product. With lane = 4g + t (g in 0..7, t in 0..3):

* keys: selector (tile, slice), nibble (r, kh, kl) holds token ``4g + 2 tile + r`` of the chunk
  and matrix column ``k = 8 kh + 2 t + kl`` of the slice. Slice 2u + ab holds member ab of the
  RoPE pairs 16u..16u+15. Where the pairs are 8 modulo 16, one last slice holds both members of
  the remaining eight: column k is member kh of pair ``2t + kl``.
* values: selector (mt, xy), nibble (r, ih, il) holds channel ``g D/8 + 2 mt + r`` and token
  ``8 t + 4 ih + 2 xy + il`` of the chunk.

Everything here works on bytes (two nibbles each), which both halves the work on a CPU and
keeps the arithmetic unsigned.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNKS, LANES, GROUP = 2, 32, 4
_LANE = (8, 4)  # g, t


def key_to_fragments(codes: Tensor) -> Tensor:
    """Codes uint8 [..., 64, 2, P] (pair member, pair) -> [..., 2, 32, P/4, 8] nibbles."""
    lead, pairs = codes.shape[:-3], codes.shape[-1]
    full = pairs // 16
    # token = (chunk, g, tile, r)
    x = codes.reshape(*lead, CHUNKS, 8, 2, 2, 2, pairs)
    n = len(lead)
    c, g, tile, r, ab = (n + i for i in range(5))
    u, kh, t, kl = (n + 5 + i for i in range(4))
    parts = []
    if full:
        body = x[..., : 16 * full].reshape(*lead, CHUNKS, 8, 2, 2, 2, full, 2, 4, 2)
        body = body.permute(*range(n), c, g, t, tile, u, ab, r, kh, kl)
        parts.append(body.reshape(*lead, CHUNKS, LANES, 2, 2 * full, 8))
    if pairs % 16:
        tail = x[..., 16 * full :].reshape(*lead, CHUNKS, 8, 2, 2, 2, 4, 2)
        # axes now: c, g, tile, r, member, t, kl
        tail = tail.permute(*range(n), c, g, n + 5, tile, r, ab, n + 6)
        parts.append(tail.reshape(*lead, CHUNKS, LANES, 2, 1, 8))
    return torch.cat(parts, -2).reshape(*lead, CHUNKS, LANES, pairs // 4, 8)


def key_from_fragments(nibbles: Tensor) -> Tensor:
    """Inverse of :func:`key_to_fragments`: [..., 2, 32, P/4, 8] -> [..., 64, 2, P]."""
    lead, pairs = nibbles.shape[:-4], 4 * nibbles.shape[-2]
    full, n = pairs // 16, len(nibbles.shape[:-4])
    x = nibbles.reshape(*lead, CHUNKS, *_LANE, 2, pairs // 8, 2, 2, 2)
    c, g, t, tile = (n + i for i in range(4))
    parts = []
    if full:
        body = x[..., : 2 * full, :, :, :].reshape(*lead, CHUNKS, *_LANE, 2, full, 2, 2, 2, 2)
        u, ab, r, kh, kl = (n + 4 + i for i in range(5))
        body = body.permute(*range(n), c, g, tile, r, ab, u, kh, t, kl)
        parts.append(body.reshape(*lead, 64, 2, 16 * full))
    if pairs % 16:
        tail = x[..., -1, :, :, :]
        r, kh, kl = (n + 4 + i for i in range(3))
        tail = tail.permute(*range(n), c, g, tile, r, kh, t, kl)
        parts.append(tail.reshape(*lead, 64, 2, 8))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def value_to_fragments(codes: Tensor) -> Tensor:
    """Codes uint8 [..., 64, D] -> [..., 2, 32, D/8, 8] nibbles; D a multiple of 16."""
    lead, dim = codes.shape[:-2], codes.shape[-1]
    n = len(lead)
    # token = (chunk, t, ih, xy, il), channel = (g, mt, r)
    x = codes.reshape(*lead, CHUNKS, 4, 2, 2, 2, 8, dim // 16, 2)
    c, t, ih, xy, il, g, mt, r = (n + i for i in range(8))
    x = x.permute(*range(n), c, g, t, mt, xy, r, ih, il)
    return x.reshape(*lead, CHUNKS, LANES, dim // 8, 8)


def value_from_fragments(nibbles: Tensor) -> Tensor:
    """Inverse of :func:`value_to_fragments`: [..., 2, 32, D/8, 8] -> [..., 64, D]."""
    lead, dim = nibbles.shape[:-4], 8 * nibbles.shape[-2]
    n = len(lead)
    x = nibbles.reshape(*lead, CHUNKS, *_LANE, dim // 16, 2, 2, 2, 2)
    c, g, t, mt, xy, r, ih, il = (n + i for i in range(8))
    x = x.permute(*range(n), c, t, ih, xy, il, g, mt, r)
    return x.reshape(*lead, 64, dim)


def pack_words(nibbles: Tensor, bits: int) -> Tensor:
    """Selectors [..., 2, 32, n, 8] uint8 -> packed bytes [..., 2 * 32 * n * bits] uint8.

    Four selectors share ``bits`` words (see :func:`_pack_group`). Groups of four stay inside a
    chunk where n allows it, and run across the page's two chunks where it does not.
    """
    lead, n = nibbles.shape[:-4], nibbles.shape[-2]
    sections = CHUNKS if n % GROUP == 0 else 1
    halves = [nibbles] if bits <= 4 else [nibbles & 15, nibbles >> 4]
    widths = [bits] if bits <= 4 else [4, bits - 4]
    words = []
    for half, width in zip(halves, widths, strict=True):
        data = half[..., 0::2] | half[..., 1::2] << 4
        data = lanes_first(data, sections)  # [..., section, lane, selectors, 4 bytes]
        data = data.reshape(*data.shape[:-2], -1, GROUP, 4)
        words.append(_pack_group(data, width))
    out = torch.cat(words, -2)  # [..., section, lane, groups, bits, 4]
    return _interleave(out.flatten(-3, -2)).reshape(*lead, -1)


def unpack_words(data: Tensor, bits: int, selectors: int) -> Tensor:
    """Inverse of :func:`pack_words`: bytes [..., 256 n bits] -> [..., 2, 32, n, 8] uint8."""
    lead = data.shape[:-1]
    sections = CHUNKS if selectors % GROUP == 0 else 1
    per_lane = CHUNKS * selectors // sections * bits // 4
    width = vector_width(per_lane)
    x = data.reshape(*lead, sections, per_lane // width, LANES, width, 4)
    x = x.transpose(-4, -3).reshape(*lead, sections, LANES, per_lane // bits, bits, 4)
    low = torch.stack(unpack_group(x[..., : min(bits, 4), :], min(bits, 4)), -2)
    nibbles = _split_nibbles(low)
    if bits > 4:
        high = torch.stack(unpack_group(x[..., 4:, :], bits - 4), -2)
        nibbles = nibbles | _split_nibbles(high) << 4
    nibbles = nibbles.reshape(*lead, sections, LANES, CHUNKS // sections, selectors, 8)
    return nibbles.transpose(-4, -3).reshape(*lead, CHUNKS, LANES, selectors, 8)


def lanes_first(data: Tensor, sections: int) -> Tensor:
    """[..., 2, 32, n, 4] -> [..., section, 32, selectors of the section, 4]."""
    lead, n = data.shape[:-4], data.shape[-2]
    x = data.reshape(*lead, sections, CHUNKS // sections, LANES, n, 4).transpose(-4, -3)
    return x.reshape(*lead, sections, LANES, CHUNKS // sections * n, 4)


def vector_width(words: int) -> int:
    """Words of the widest load (16, 8 or 4 bytes) that divides a lane's words."""
    return next(width for width in (4, 2, 1) if words % width == 0)


def _interleave(words: Tensor) -> Tensor:
    """Per-lane words [..., 32, W, 4] -> [..., W / width, 32, width, 4], one load a row."""
    count = words.shape[-2]
    width = vector_width(count)
    x = words.reshape(*words.shape[:-2], count // width, width, 4)
    return x.transpose(-4, -3)


def _pack_group(sel: Tensor, bits: int) -> Tensor:
    """Four selectors [..., 4, 4 bytes] with codes below 2**bits -> [..., bits, 4 bytes].

    At 3 bits the fourth selector's bits ride in the free top bits of the other three's nibbles.
    """
    s0, s1, s2, s3 = sel.unbind(-2)
    if bits == 4:
        return sel
    if bits == 3:
        words = [s0 | (s3 & 0x11) << 3, s1 | (s3 & 0x22) << 2, s2 | (s3 & 0x44) << 1]
    elif bits == 2:
        words = [s0 | s1 << 2, s2 | s3 << 2]
    else:
        words = [s0 | s1 << 1 | s2 << 2 | s3 << 3]
    return torch.stack(words, -2)


def unpack_group(words: Tensor, bits: int, axis: int = -2) -> list[Tensor]:
    """The four selectors whose codes share ``bits`` words along ``axis``, each of the words' shape
    without it; inverse of packing."""
    w = words.unbind(axis)
    if bits == 4:
        return list(w)
    if bits == 3:
        fourth = (w[0] >> 3 & 0x11) | (w[1] >> 2 & 0x22) | (w[2] >> 1 & 0x44)
        return [w[0] & 0x77, w[1] & 0x77, w[2] & 0x77, fourth]
    if bits == 2:
        return [w[0] & 0x33, w[0] >> 2 & 0x33, w[1] & 0x33, w[1] >> 2 & 0x33]
    return [w[0] >> shift & 0x11 for shift in range(GROUP)]


def _split_nibbles(data: Tensor) -> Tensor:
    """Bytes [..., 4] -> nibbles [..., 8], low nibble first."""
    return torch.stack([data & 15, data >> 4], -1).flatten(-2)
