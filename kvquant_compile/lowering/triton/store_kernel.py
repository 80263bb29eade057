"""The kernel that sets a step's codes, scales and slots in their pages."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _packed(s0, s1, s2, s3, BITS: tl.constexpr, WORD: tl.constexpr):
    """Word ``WORD`` of four selectors of codes below ``2**BITS``; see ``codec.fragments``."""
    if BITS == 4:
        return s0 if WORD == 0 else (s1 if WORD == 1 else (s2 if WORD == 2 else s3))
    if BITS == 3:
        if WORD == 0:
            return s0 | ((s3 & 0x11111111) << 3)
        if WORD == 1:
            return s1 | ((s3 & 0x22222222) << 2)
        return s2 | ((s3 & 0x44444444) << 1)
    if BITS == 2:
        return s0 | (s1 << 2) if WORD == 0 else s2 | (s3 << 2)
    return s0 | (s1 << 1) | (s2 << 2) | (s3 << 3)


@triton.jit
def _set_words(
    words, s0, s1, s2, s3, m0, m1, m2, m3, section, lane, group, live,
    BITS: tl.constexpr, FIRST: tl.constexpr, ALL_BITS: tl.constexpr, PER_LANE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Replace the bits ``m`` of a group's words by those of ``s``."""
    for i in tl.static_range(BITS):
        k = group * ALL_BITS + FIRST + i
        at = section * (32 * PER_LANE) + k // WIDTH * (32 * WIDTH) + lane * WIDTH + k % WIDTH
        mask = _packed(m0, m1, m2, m3, BITS, i)
        old = tl.load(words + at, mask=live, other=0)
        fresh = _packed(s0, s1, s2, s3, BITS, i)
        tl.store(words + at, (old & ~mask) | fresh, mask=live & (mask != 0))


@triton.jit
def _set_codes(
    words, codes, width, inverse, start, count, page, part,
    KEYS: tl.constexpr, BITS: tl.constexpr, SELECTORS: tl.constexpr, PAIRS: tl.constexpr,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, PER_LANE: tl.constexpr, WIDTH: tl.constexpr,
    APART: tl.constexpr, GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr,
):  # fmt: skip
    """Set the codes of the page's tokens ``8 part .. 8 part + 7`` of both chunks.

    They share no word with any other token. ``codes`` points at the row's [S, width] codes.
    """
    row = tl.arange(0, 8)[:, None]
    every = tl.arange(0, GROUPS_POW2)[None, :]
    # Of keys g is 2 part or 2 part + 1, of values t is part.
    lane = 8 * part + row if KEYS else 4 * row + part
    g, t = lane // 4, lane % 4
    live = (every < GROUPS) & (row >= 0)
    per_section: tl.constexpr = GROUPS // 2 if APART else GROUPS
    per_tile: tl.constexpr = PAIRS // 8
    section, group = every // per_section, every % per_section
    low = ()
    high = ()
    masks = ()
    masks_high = ()
    for q in tl.static_range(4):
        index = group * 4 + q
        chunk = section if APART else index // SELECTORS
        selector = index if APART else index % SELECTORS
        a = every * 0 + row * 0
        b, m, n = a, a, a
        for nibble in tl.static_range(8):
            r = nibble // 4
            kh = nibble // 2 % 2
            kl = nibble % 2
            if KEYS:
                piece = selector % per_tile
                token = 32 * chunk + 4 * g + 2 * (selector // per_tile) + r
                channel = piece % 2 * PAIRS + 16 * (piece // 2) + 8 * kh + 2 * t + kl
                tail = kh * PAIRS + 16 * (PAIRS // 16) + 2 * t + kl
                channel = tl.where(piece >= 2 * (PAIRS // 16), tail, channel)
            else:
                token = 32 * chunk + 8 * t + 4 * kh + 2 * (selector % 2) + kl
                channel = g * (CHANNELS // 8) + 2 * (selector // 2) + r
            rank = page * 64 + token - start
            fresh = live & (rank >= 0) & (rank < count)
            step = tl.load(inverse + rank, mask=fresh, other=0)
            code = tl.load(
                codes + step * width + channel, mask=fresh & (channel < DIM), other=0
            ).to(tl.int32)
            ones = tl.where(fresh, (1 << (BITS if BITS < 4 else 4)) - 1, 0)
            a |= (code & 15) << (4 * nibble)
            m |= ones << (4 * nibble)
            if BITS > 4:
                b |= (code >> 4) << (4 * nibble)
                n |= tl.where(fresh, (1 << (BITS - 4)) - 1, 0) << (4 * nibble)
        low += (a,)
        high += (b,)
        masks += (m,)
        masks_high += (n,)
    _set_words(
        words, low[0], low[1], low[2], low[3], masks[0], masks[1], masks[2], masks[3],
        section, lane, group, live, BITS if BITS < 4 else 4, 0, BITS, PER_LANE, WIDTH,
    )  # fmt: skip
    if BITS > 4:
        _set_words(
            words, high[0], high[1], high[2], high[3], masks_high[0], masks_high[1],
            masks_high[2], masks_high[3], section, lane, group, live, BITS - 4, 4, BITS,
            PER_LANE, WIDTH,
        )  # fmt: skip


@triton.jit
def _set_slots(
    page_byte, index, residual, step, token, fresh, SLOTS: tl.constexpr, INDEX: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Set slot channels and residuals of some tokens."""
    bytes_ = page_byte.to(tl.pointer_type(tl.uint8))
    halves = page_byte.to(tl.pointer_type(tl.float16))
    for slot in tl.static_range(SLOTS):
        channel = tl.load(index + step * SLOTS + slot, mask=fresh, other=0)
        tl.store(bytes_ + INDEX + 64 * slot + token, channel, mask=fresh)
        rest = tl.load(residual + step * SLOTS + slot, mask=fresh, other=0.0)
        tl.store(halves + RESIDUAL // 2 + 64 * slot + token, rest, mask=fresh)


@triton.jit
def store_kernel(
    key_codes, key_index, key_residual, key_scale, value_codes, value_scale, value_zero,
    value_index, value_residual, key, value, sinks,
    starts, counts, inverse, table, addresses,
    heads, steps, columns, table_row, page_bytes, key_width, value_width,
    KEY_BITS: tl.constexpr, KEY_SELECTORS: tl.constexpr, PAIRS: tl.constexpr,
    KEY_PER_LANE: tl.constexpr, KEY_VECTOR: tl.constexpr, KEY_APART: tl.constexpr,
    KEY_GROUPS: tl.constexpr, KEY_GROUPS_POW2: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_SELECTORS: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr, VALUE_PER_LANE: tl.constexpr, VALUE_VECTOR: tl.constexpr,
    VALUE_APART: tl.constexpr, VALUE_GROUPS: tl.constexpr, VALUE_GROUPS_POW2: tl.constexpr,
    KEY_SLOTS: tl.constexpr, VALUE_SLOTS: tl.constexpr, TOKEN_SCALE: tl.constexpr,
    KEY_CODES: tl.constexpr, KEY_INDEX: tl.constexpr, KEY_RESIDUAL: tl.constexpr,
    KEY_SCALE: tl.constexpr, VALUE_CODES: tl.constexpr, VALUE_SCALE: tl.constexpr,
    VALUE_INDEX: tl.constexpr, VALUE_RESIDUAL: tl.constexpr, SINKS: tl.constexpr,
    WIDTH_POW2: tl.constexpr,
):  # fmt: skip
    """Store a step's tokens: grid (batch * heads, 4 * pages touched at most).

    Codes, scales and slots are contiguous [B, H, S, ...]; ``starts``, ``counts`` [B] are the
    first slot and the number of real tokens, ``inverse`` [B, S] the step of each of them.
    """
    row = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start = tl.load(starts + row)
    count = tl.load(counts + row)
    page = start // 64 + tl.program_id(1) // 4
    part = tl.program_id(1) % 4
    inverse += row * steps
    used = (count > 0) & (page * 64 < start + count)
    if used:
        identity = tl.load(table + row * table_row + tl.minimum(page, columns - 1))
        address = tl.load(addresses + identity) + head * page_bytes
        words = address.to(tl.pointer_type(tl.int32))
        first = tl.program_id(0).to(tl.int64) * steps
        _set_codes(
            words + KEY_CODES // 4, key_codes + first * key_width, key_width, inverse, start,
            count, page, part, True, KEY_BITS, KEY_SELECTORS, PAIRS, 2 * PAIRS, 2 * PAIRS,
            KEY_PER_LANE, KEY_VECTOR, KEY_APART, KEY_GROUPS, KEY_GROUPS_POW2,
        )  # fmt: skip
        _set_codes(
            words + VALUE_CODES // 4, value_codes + first * value_width, value_width, inverse,
            start, count, page, part, False, VALUE_BITS, VALUE_SELECTORS, PAIRS, VALUE_DIM,
            VALUE_CHANNELS, VALUE_PER_LANE, VALUE_VECTOR, VALUE_APART, VALUE_GROUPS,
            VALUE_GROUPS_POW2,
        )  # fmt: skip
        i = tl.arange(0, 16)
        token = i // 8 * 32 + 8 * part + i % 8
        rank = page * 64 + token - start
        fresh = (rank >= 0) & (rank < count)
        step = tl.load(inverse + rank, mask=fresh, other=0)
        halves = address.to(tl.pointer_type(tl.float16))
        if TOKEN_SCALE:
            scale = tl.load(key_scale + first + step, mask=fresh, other=0.0)
            tl.store(halves + KEY_SCALE // 2 + token, scale, mask=fresh)
        scale = tl.load(value_scale + first + step, mask=fresh, other=0.0)
        zero = tl.load(value_zero + first + step, mask=fresh, other=0.0)
        tl.store(halves + VALUE_SCALE // 2 + 2 * token, scale, mask=fresh)
        tl.store(halves + VALUE_SCALE // 2 + 2 * token + 1, zero, mask=fresh)
        _set_slots(
            address, key_index + first * KEY_SLOTS, key_residual + first * KEY_SLOTS, step, token,
            fresh, KEY_SLOTS, KEY_INDEX, KEY_RESIDUAL,
        )  # fmt: skip
        _set_slots(
            address, value_index + first * VALUE_SLOTS, value_residual + first * VALUE_SLOTS, step,
            token, fresh, VALUE_SLOTS, VALUE_INDEX, VALUE_RESIDUAL,
        )  # fmt: skip
        if SINKS > 0:
            slot = page * 64 + token
            c = tl.arange(0, WIDTH_POW2)[None, :]
            width: tl.constexpr = 2 * PAIRS + VALUE_DIM
            exact = (fresh & (slot < SINKS))[:, None]
            to = sinks + (tl.program_id(0).to(tl.int64) * SINKS + slot[:, None]) * width
            keys = tl.load(
                key + (first + step[:, None]) * (2 * PAIRS) + c, mask=exact & (c < 2 * PAIRS)
            )
            tl.store(to + c, keys.to(sinks.dtype.element_ty), mask=exact & (c < 2 * PAIRS))
            values = tl.load(
                value + (first + step[:, None]) * VALUE_DIM + c, mask=exact & (c < VALUE_DIM)
            )
            tl.store(to + 2 * PAIRS + c, values.to(sinks.dtype.element_ty),
                     mask=exact & (c < VALUE_DIM))  # fmt: skip
