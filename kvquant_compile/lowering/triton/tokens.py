"""Device functions on what belongs to a page's tokens, in the order of rows or lanes, see
:mod:`.words`.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvquant_compile.lowering.triton.words import (
    double_lower,
    double_upper,
    halves,
    joined4,
    pack_halves,
)


@triton.jit
def seen_bits(seen, W: tl.constexpr):
    """A bit for each of 64 tokens [W, 64], 32 a word: int32 [W, 2]."""
    place = tl.arange(0, 64)[None, :] % 32
    return tl.sum((seen.to(tl.int32) << place).reshape([W, 2, 32]), 2)


@triton.jit
def first_bits(count):
    """A word whose lowest ``count`` bits are set; none below 0, all from 32 on."""
    return tl.where(count >= 32, -1, (1 << tl.maximum(count, 0)) - 1)


@triton.jit
def row_order(x, W: tl.constexpr):
    """Something of every token of a page [W, 64] in the row order of :func:`key_rows`."""
    return x.reshape([W, 2, 8, 2, 2]).permute([0, 1, 3, 4, 2]).reshape([W, 64])


@triton.jit
def pair_rows(x0, x1, x2, x3, W: tl.constexpr):
    """Something of two neighbours (the last axis) of four tiles [W, 8, 2] in the row order of keys:
    [W, 64]."""
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # g, r, chunk, tile
    return x.permute([0, 3, 4, 2, 1]).reshape([W, 64])


@triton.jit
def half_rows(x0, x1, x2, x3, W: tl.constexpr):
    """The halves of words [W, 8] of four tiles in the row order of keys."""
    return pair_rows(halves(x0), halves(x1), halves(x2), halves(x3), W)


@triton.jit
def _two_words(x):
    """int64 [...] -> int32 [..., 2]."""
    return tl.join(x.to(tl.int32), (x >> 32).to(tl.int32))


@triton.jit
def word_rows(x0, x1, x2, x3, W: tl.constexpr):
    """The words of int64 [W, 8] of four tiles in the row order of keys."""
    return pair_rows(_two_words(x0), _two_words(x1), _two_words(x2), _two_words(x3), W)


@triton.jit
def pair_tokens(words, g, W: tl.constexpr):
    """A half for each of 64 tokens [W, 32 words], by lane, tile and r, each doubled:
    [W, 32, 4, 2]."""
    at = tl.zeros([W, 32], tl.int32) + 2 * g
    x = joined4(
        tl.gather(words, at, 1), tl.gather(words, at + 1, 1),
        tl.gather(words, at + 16, 1), tl.gather(words, at + 17, 1), W,
    )  # fmt: skip
    return tl.join(double_lower(x), double_upper(x))


@triton.jit
def key_tokens(words, g, W: tl.constexpr):
    """A byte for each of 64 tokens [W, 16 words, twice], by lane, tile and r: [W, 32, 4, 2]."""
    at = tl.zeros([W, 32], tl.int32) + g
    x = tl.join(tl.gather(words, at, 1), tl.gather(words, at + 8, 1))
    x = tl.join(tl.join(x, x >> 16), tl.join(x >> 8, x >> 24)).reshape([W, 32, 4, 2])
    return x & 255


@triton.jit
def value_tokens(words, t, first, W: tl.constexpr):
    """A byte for each of 64 tokens [W, 16 words, twice], less ``first`` [1, 32], as halves of
    two neighbouring tokens: [W, 32, 4, 2] of (chunk, tile), ih."""
    at = tl.zeros([W, 32], tl.int32) + 2 * t
    x = joined4(
        tl.gather(words, at, 1), tl.gather(words, at + 1, 1),
        tl.gather(words, at + 8, 1), tl.gather(words, at + 9, 1), W,
    )  # fmt: skip
    x = tl.join(x, x >> 16)  # the tile
    even = ((x & 255) - first[:, :, None, None]).to(tl.float32)
    odd = ((x >> 8 & 255) - first[:, :, None, None]).to(tl.float32)
    words = pack_halves(even, odd).reshape([W, 32, 2, 2, 2]).permute([0, 1, 2, 4, 3])
    return words.reshape([W, 32, 4, 2])
