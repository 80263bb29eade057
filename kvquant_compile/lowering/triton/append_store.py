"""Device functions that put a program's codes and slots into their page."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvquant_compile.lowering.triton.quantise_steps import to_half


@triton.jit
def packed(s0, s1, s2, s3, BITS: tl.constexpr, WORD: tl.constexpr):
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
    words, s0, s1, s2, s3, m0, m1, m2, m3, section, lane, group, inside,
    BITS: tl.constexpr, FIRST: tl.constexpr, ALL_BITS: tl.constexpr, PER_LANE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Replace the bits ``m`` of a group's words by those of ``s``."""
    for i in tl.static_range(BITS):
        k = group * ALL_BITS + FIRST + i
        at = section * (32 * PER_LANE) + k // WIDTH * (32 * WIDTH) + lane * WIDTH + k % WIDTH
        mask = packed(m0, m1, m2, m3, BITS, i)
        old = tl.load(words + at, mask=inside, other=0)
        fresh = packed(s0, s1, s2, s3, BITS, i)
        tl.store(words + at, (old & ~mask) | fresh, mask=inside & (mask != 0))


@triton.jit
def _key_channel(selector, t, KH: tl.constexpr, KL: tl.constexpr, SELECTORS: tl.constexpr):
    """Channel of a key's code in nibble (KH, KL) of a selector, in fragment column ``t``."""
    pairs: tl.constexpr = 4 * SELECTORS
    whole: tl.constexpr = pairs // 16
    piece = selector % (SELECTORS // 2)
    channel = piece % 2 * pairs + 16 * (piece // 2) + 8 * KH + 2 * t + KL
    tail = KH * pairs + 16 * whole + 2 * t + KL
    return tl.where(piece >= 2 * whole, tail, channel)


@triton.jit
def set_codes(
    words, codes, start, count, part,
    KEYS: tl.constexpr, BITS: tl.constexpr, SELECTORS: tl.constexpr, PER_LANE: tl.constexpr,
    WIDTH: tl.constexpr, APART: tl.constexpr, GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr,
    TOKENS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Set the codes of a page's tokens ``8 part .. 8 part + 7`` of both chunks.

    They share no word with any other token. Of these, the tokens ``start .. start + count - 1``
    of the page are new; ``codes`` points at [TOKENS, ROW] of them, a row for each of
    the sixteen, or one for the only new one.
    """
    per_tile: tl.constexpr = SELECTORS // 2
    per_section: tl.constexpr = GROUPS // 2 if APART else GROUPS
    low_bits: tl.constexpr = BITS if BITS < 4 else 4
    row = tl.arange(0, 8)[:, None]
    every = tl.arange(0, GROUPS_POW2)[None, :]
    # Of keys g is 2 part or 2 part + 1, of values t is part.
    lane = 8 * part + row if KEYS else 4 * row + part
    g, t = lane // 4, lane % 4
    inside = (every < GROUPS) & (row >= 0)
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
            r, kh, kl = nibble // 4, nibble // 2 % 2, nibble % 2
            if KEYS:
                token = 32 * chunk + 4 * g + 2 * (selector // per_tile) + r
                channel = _key_channel(selector, t, kh, kl, SELECTORS)
            else:
                token = 32 * chunk + 8 * t + 4 * kh + 2 * (selector % 2) + kl
                channel = g * SELECTORS + 2 * (selector // 2) + r
            fresh = inside & (token >= start) & (token < start + count)
            which = 8 * chunk + token % 8 if TOKENS > 1 else 0
            code = tl.load(codes + which * ROW + channel, mask=fresh, other=0)
            code = code.to(tl.int32)
            a |= (code & 15) << (4 * nibble)
            m |= tl.where(fresh, (1 << low_bits) - 1, 0) << (4 * nibble)
            if BITS > 4:
                b |= (code >> 4) << (4 * nibble)
                n |= tl.where(fresh, (1 << (BITS - 4)) - 1, 0) << (4 * nibble)
        low += (a,)
        high += (b,)
        masks += (m,)
        masks_high += (n,)
    _set_words(
        words, low[0], low[1], low[2], low[3], masks[0], masks[1], masks[2], masks[3],
        section, lane, group, inside, low_bits, 0, BITS, PER_LANE, WIDTH,
    )  # fmt: skip
    if BITS > 4:
        _set_words(
            words, high[0], high[1], high[2], high[3], masks_high[0], masks_high[1],
            masks_high[2], masks_high[3], section, lane, group, inside, BITS - 4, 4, BITS,
            PER_LANE, WIDTH,
        )  # fmt: skip


@triton.jit
def set_slot(
    page_byte, token, live, channel, residual, SLOT: tl.constexpr, INDEX: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Set a slot's channel and residual for some tokens [T, 1]."""
    to = page_byte.to(tl.pointer_type(tl.uint8)) + INDEX + 64 * SLOT + token
    tl.store(to, channel.to(tl.uint8), mask=live)
    to = page_byte.to(tl.pointer_type(tl.float16)) + RESIDUAL // 2 + 64 * SLOT + token
    tl.store(to, to_half(residual), mask=live)


@triton.jit
def token_codes(
    codes, first, row, section, index,
    KEYS: tl.constexpr, SELECTORS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """What the token ``first`` of a page has in selectors: low and high nibbles, and a 1 in each
    nibble that is its. ``codes`` as ``code_bytes`` leaves them, the others [N] lanes."""
    per_tile: tl.constexpr = SELECTORS // 2
    last: tl.constexpr = 4 * codes.shape[0] - 1
    chunk = section if APART else index // SELECTORS
    selector = index if APART else index % SELECTORS
    tile = selector // per_tile if KEYS else selector % 2
    fresh = (chunk == first // 32) & (tile == first % 4 // 2)
    low = row * 0
    high, ones = low, low
    for i in tl.static_range(4 if KEYS else 2):
        if KEYS:
            channel = _key_channel(selector, row, i // 2, i % 2, SELECTORS)
        else:
            channel = row * SELECTORS + 2 * (selector // 2) + i
        nibble = 4 * i if KEYS else 16 * i
        channel = channel & last
        word = tl.gather(codes, channel // 128 * 32 + channel % 32, 0)
        code = (word >> (channel % 128 // 32 * 8)) & 0xFF
        low |= (code & 15) << nibble
        high |= (code >> 4) << nibble
        ones |= 1 << nibble
    shift = first % 2 * 16 if KEYS else first % 8 // 4 * 8 + first % 2 * 4
    return (
        tl.where(fresh, low, 0) << shift,
        tl.where(fresh, high, 0) << shift,
        tl.where(fresh, ones, 0) << shift,
    )
