"""Kernels that turn pages into plain keys and values of a workspace.

Words are addressed from (token, channel), the inverse of :mod:`kvquant_compile.codec.fragments`:
neighbouring threads want codes of the same few words, which the L1 cache serves.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvquant_compile.lowering.triton.ring import exact_base, exact_line, exact_slots
from kvquant_compile.lowering.triton.words import circle


@triton.jit
def _word(
    words, section, lane, k, live, PER_LANE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Word ``k`` of a lane."""
    at = section * (32 * PER_LANE) + k // WIDTH * (32 * WIDTH) + lane * WIDTH + k % WIDTH
    return tl.load(words + at, mask=live, other=0)


@triton.jit
def _nibble(
    words, section, lane, k, q, shift, live, BITS: tl.constexpr, PER_LANE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Codes of ``BITS`` bits, at most 4, in selector ``q`` of the four that share words ``k ..``;
    ``shift`` is the nibble's first bit. See ``codec.fragments.unpack_group``."""
    if BITS == 4:
        return (_word(words, section, lane, k + q, live, PER_LANE, WIDTH) >> shift) & 15
    if BITS == 3:
        w0 = _word(words, section, lane, k, live, PER_LANE, WIDTH) >> shift
        w1 = _word(words, section, lane, k + 1, live, PER_LANE, WIDTH) >> shift
        w2 = _word(words, section, lane, k + 2, live, PER_LANE, WIDTH) >> shift
        fourth = ((w0 >> 3) & 1) | ((w1 >> 2) & 2) | ((w2 >> 1) & 4)
        own = tl.where(q == 0, w0, tl.where(q == 1, w1, w2)) & 7
        return tl.where(q == 3, fourth, own)
    if BITS == 2:
        word = _word(words, section, lane, k + q // 2, live, PER_LANE, WIDTH)
        return (word >> (shift + q % 2 * 2)) & 3
    return (_word(words, section, lane, k, live, PER_LANE, WIDTH) >> (shift + q)) & 1


@triton.jit
def _levels(
    words, table, section, lane, group, q, shift, live, BITS: tl.constexpr,
    PER_LANE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Table entries, float32, of the codes in selector ``q`` of a group of four."""
    k = group * BITS
    if BITS <= 4:
        code = _nibble(words, section, lane, k, q, shift, live, BITS, PER_LANE, WIDTH)
    else:
        low = _nibble(words, section, lane, k, q, shift, live, 4, PER_LANE, WIDTH)
        high = _nibble(words, section, lane, k + 4, q, shift, live, BITS - 4, PER_LANE, WIDTH)
        code = low | (high << 4)
    return tl.load(table + code, mask=live, other=0).to(tl.float32)


@triton.jit
def _key_levels(
    words, table, token, pair, live, PAIRS: tl.constexpr, BITS: tl.constexpr,
    PER_LANE: tl.constexpr, WIDTH: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Levels of both members of the pairs: ``token`` [N, 1] in its page, ``pair`` [1, P]."""
    chunk, tile, r = token // 32, token // 2 % 2, token % 2
    lane = token % 32 // 4 * 4 + pair // 2 % 4
    shift = 16 * r + pair // 8 % 2 * 8 + pair % 2 * 4
    # Slices 2u and 2u + 1 hold the members of pairs 16u ..; one last slice of eight pairs both.
    index = tile * (PAIRS // 8) + pair // 16 * 2
    if APART:
        section = chunk
    else:
        section = 0
        index += chunk * (PAIRS // 4)
    a = _levels(words, table, section, lane, index // 4, index % 4, shift, live, BITS, PER_LANE,
                WIDTH)  # fmt: skip
    if PAIRS % 16 == 0:  # the members' selectors share a group, hence the loads of its words
        b = _levels(words, table, section, lane, index // 4, index % 4 + 1, shift, live, BITS,
                    PER_LANE, WIDTH)  # fmt: skip
    else:
        tail = pair >= PAIRS // 16 * 16
        index += tl.where(tail, 0, 1)
        shift += tl.where(tail, 8, 0)
        b = _levels(words, table, section, lane, index // 4, index % 4, shift, live, BITS,
                    PER_LANE, WIDTH)  # fmt: skip
    return a, b


@triton.jit
def _scaled_keys(
    a, b, address, token, pair, scale, zero, PAIRS: tl.constexpr, SLOTS: tl.constexpr,
    TOKEN_SCALE: tl.constexpr, INDEX: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Keys from levels: token scale, zeros, scales, and what the page's slots hold."""
    halves = address.to(tl.pointer_type(tl.float16))
    known = pair < PAIRS
    if TOKEN_SCALE:
        factor = tl.load(halves + SCALE // 2 + token).to(tl.float32)[:, None]
        a *= factor
        b *= factor
    a += tl.load(zero + pair, mask=known, other=0.0)
    b += tl.load(zero + pair + PAIRS, mask=known, other=0.0)
    a *= tl.load(scale + pair, mask=known, other=0.0)
    b *= tl.load(scale + pair + PAIRS, mask=known, other=0.0)
    for i in tl.static_range(SLOTS):
        at = tl.load(address.to(tl.pointer_type(tl.uint8)) + INDEX + 64 * i + token)
        rest = tl.load(halves + RESIDUAL // 2 + 64 * i + token).to(tl.float32)[:, None]
        a += tl.where(at.to(tl.int32)[:, None] == pair, rest, 0.0)
        b += tl.where(at.to(tl.int32)[:, None] == pair + PAIRS, rest, 0.0)
    return a, b


@triton.jit
def _rotated(a, b, position, pair, turns, rope_scale, known, NATIVE: tl.constexpr):
    """Both members of the pairs, turned to their positions."""
    turn = tl.load(turns + pair, mask=known, other=0)
    stretch = tl.load(rope_scale + pair, mask=known, other=1.0)
    angle = ((position.to(tl.int64)[:, None] * turn) >> 32).to(tl.int32)
    cos, sin = circle(angle, NATIVE)
    cos, sin = cos * stretch, sin * stretch
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def key_kernel(
    keys, places, limit, positions, table, addresses, levels, scale, zero, turns, rope_scale,
    query_order, sinks, heads, first, block, table_row, position_row, page_bytes,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAIRS: tl.constexpr, PAIRS_POW2: tl.constexpr,
    BITS: tl.constexpr, PER_LANE: tl.constexpr, WIDTH: tl.constexpr, APART: tl.constexpr,
    SLOTS: tl.constexpr, TOKEN_SCALE: tl.constexpr, CODES: tl.constexpr, INDEX: tl.constexpr,
    RESIDUAL: tl.constexpr, SCALE: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
    ORDER: tl.constexpr, ROPE: tl.constexpr, NATIVE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Rotated keys of the slots ``first .. first + block - 1``, in the model's channel order.

    Grid (block / TOKENS, batch * heads). Writes keys [B, H, block, DIM], and places int32
    [B, block]: the slot, or -1 where there is no token or it is hidden.
    """
    row = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    start = first + tl.program_id(0) * TOKENS
    slot = start + tl.arange(0, TOKENS)
    stored = tl.load(limit + row)
    position = tl.load(positions + row * position_row + slot, mask=slot < stored, other=-1)
    if head == 0:
        tl.store(places + row * block + slot - first, tl.where(position >= 0, slot, -1))
    if start // 64 * 64 < stored:  # whole pages: a tile of keys may end after the last token
        identity = tl.load(table + row * table_row + start // 64)
        address = tl.load(addresses + identity) + head * page_bytes
        token = slot % 64
        p = tl.arange(0, PAIRS_POW2)[None, :]
        known = p < PAIRS
        live = (slot < stored)[:, None] & known
        a, b = _key_levels(
            address.to(tl.pointer_type(tl.int32)) + CODES // 4, levels + head * (1 << BITS),
            token[:, None], p, live, PAIRS, BITS, PER_LANE, WIDTH, APART,
        )  # fmt: skip
        a, b = _scaled_keys(
            a, b, address, token, p, scale + head * (2 * PAIRS), zero + head * (2 * PAIRS), PAIRS,
            SLOTS, TOKEN_SCALE, INDEX, RESIDUAL, SCALE,
        )  # fmt: skip
        if SINKS + RING > 0:
            exact_width: tl.constexpr = 2 * PAIRS + VALUE_DIM
            exact = exact_slots(sinks, row, heads, slot, stored, SINKS, RING, exact_width)[:, None]
            base = exact_base(sinks, tl.program_id(1), SINKS, RING, exact_width)
            at = base + exact_line(slot, SINKS, RING)[:, None] * exact_width + p
            x = tl.load(at, mask=exact & known, other=0.0).to(tl.float32)
            y = tl.load(at + PAIRS, mask=exact & known, other=0.0).to(tl.float32)
            a = tl.where(exact, x, a)
            b = tl.where(exact, y, b)
        if ROPE:
            a, b = _rotated(a, b, position, p, turns, rope_scale, known, NATIVE)
        ca, cb = p, p + PAIRS
        if ORDER:
            ca = tl.load(query_order + ca, mask=known, other=DIM)
            cb = tl.load(query_order + cb, mask=known, other=DIM)
        out = keys + (tl.program_id(1).to(tl.int64) * block + slot[:, None] - first) * DIM
        tl.store(out + ca, a.to(keys.dtype.element_ty), mask=known & (ca < DIM))
        tl.store(out + cb, b.to(keys.dtype.element_ty), mask=known & (cb < DIM))


@triton.jit
def _value_levels(
    words, table, token, stored, DIM: tl.constexpr, DIM_POW2: tl.constexpr,
    CHANNELS: tl.constexpr, BITS: tl.constexpr, PER_LANE: tl.constexpr, WIDTH: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Levels [N, DIM_POW2] of all channels: ``token`` [N, 1] in its page."""
    two = tl.arange(0, DIM_POW2 // 2)[None, :]  # neighbouring channels lie in one word
    index = two % (CHANNELS // 16) * 2 + token // 2 % 2
    if APART:
        section = token // 32
    else:
        section = 0
        index += token // 32 * (CHANNELS // 8)
    lane = 4 * (two // (CHANNELS // 16)) + token % 32 // 8
    shift = token // 4 % 2 * 8 + token % 2 * 4
    live = stored & (2 * two < DIM)
    a = _levels(words, table, section, lane, index // 4, index % 4, shift, live, BITS, PER_LANE,
                WIDTH)  # fmt: skip
    b = _levels(words, table, section, lane, index // 4, index % 4, shift + 16, live, BITS,
                PER_LANE, WIDTH)  # fmt: skip
    return tl.join(a, b).reshape([token.shape[0], DIM_POW2])


@triton.jit
def value_kernel(
    values, limit, table, addresses, levels, gain, offset, sinks,
    heads, first, block, table_row, page_bytes,
    DIM: tl.constexpr, DIM_POW2: tl.constexpr, KEY_WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    BITS: tl.constexpr, PER_LANE: tl.constexpr, WIDTH: tl.constexpr, APART: tl.constexpr,
    SLOTS: tl.constexpr, CODES: tl.constexpr, INDEX: tl.constexpr, RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Values [B, H, block, DIM] of the slots ``first .. first + block - 1``.

    Grid (block / TOKENS, batch * heads).
    """
    row = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    start = first + tl.program_id(0) * TOKENS
    slot = start + tl.arange(0, TOKENS)
    stored = tl.load(limit + row)
    if start // 64 * 64 < stored:  # whole pages: a tile of keys may end after the last token
        identity = tl.load(table + row * table_row + start // 64)
        address = tl.load(addresses + identity) + head * page_bytes
        halves = address.to(tl.pointer_type(tl.float16))
        token = slot % 64
        c = tl.arange(0, DIM_POW2)[None, :]
        known = c < DIM
        x = _value_levels(
            address.to(tl.pointer_type(tl.int32)) + CODES // 4, levels + head * (1 << BITS),
            token[:, None], slot[:, None] < stored, DIM, DIM_POW2, CHANNELS, BITS, PER_LANE,
            WIDTH, APART,
        )  # fmt: skip
        at = halves + SCALE // 2 + 2 * token
        x = x * tl.load(at).to(tl.float32)[:, None] + tl.load(at + 1).to(tl.float32)[:, None]
        for i in tl.static_range(SLOTS):
            where = tl.load(address.to(tl.pointer_type(tl.uint8)) + INDEX + 64 * i + token)
            rest = tl.load(halves + RESIDUAL // 2 + 64 * i + token).to(tl.float32)[:, None]
            x += tl.where(where.to(tl.int32)[:, None] == c, rest, 0.0)
        x *= tl.load(gain + head * DIM + c, mask=known, other=0.0)
        x += tl.load(offset + head * DIM + c, mask=known, other=0.0)
        if SINKS + RING > 0:
            exact_width: tl.constexpr = KEY_WIDTH + DIM
            exact = exact_slots(sinks, row, heads, slot, stored, SINKS, RING, exact_width)[:, None]
            base = exact_base(sinks, tl.program_id(1), SINKS, RING, exact_width)
            there = base + exact_line(slot, SINKS, RING)[:, None] * exact_width + KEY_WIDTH + c
            y = tl.load(there, mask=exact & known, other=0.0).to(tl.float32)
            x = tl.where(exact, y, x)
        out = values + (tl.program_id(1).to(tl.int64) * block + slot[:, None] - first) * DIM
        tl.store(out + c, x.to(values.dtype.element_ty), mask=known)
