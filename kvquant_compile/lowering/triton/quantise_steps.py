"""Device functions of the quantiser, on slices of tokens by channels.

They compute what :mod:`kvquant_compile.codec` computes, to the bit: no function relies on how a
device orders a sum, breaks a tie, contracts a product or treats NaN.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

FLOAT16_MAX = tl.constexpr(65504.0)
INFINITE_BITS = tl.constexpr(0x7F800000)
NAN_KEY = tl.constexpr(0x7FC00000)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, ties to even


@triton.jit
def clamped(x, low, high):
    """``x`` between two numbers; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def to_half(x):
    """Float16; finite values saturate, infinities and NaN stay."""
    return tl.where(tl.abs(x) == float("inf"), x, clamped(x, -65504.0, 65504.0)).to(tl.float16)


@triton.jit
def finite(x):
    """NaN becomes 0, infinities the largest float16."""
    x = tl.where(x != x, 0.0, x)
    x = tl.where(x == float("inf"), FLOAT16_MAX, x)
    return tl.where(x == -float("inf"), -FLOAT16_MAX, x)


@triton.jit
def on_grid(error):
    """Errors in eighths of a table unit, at most 63; NaN passes nothing on."""
    error = clamped(tl.where(error != error, 0.0, error), -63.0, 63.0)
    return ((error * 8.0 + ROUND) - ROUND) * 0.125


@triton.jit
def row_sum(x):
    """[T, W] -> [T, 1], as ``codec.keys.wide_sum``."""
    return tl.sum(x.to(tl.float64), 1)[:, None].to(tl.float32)


@triton.jit
def score_bits(score):
    """Scores of at least 0 as integers of the same order; every NaN is the same, and largest."""
    bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits, INFINITE_BITS + 1)


@triton.jit
def first_of(x, extreme, channel):
    """The first channel that holds the row's extreme: [T, W], [T, 1], [T, W] -> [T, 1]."""
    return tl.min(tl.where(x == extreme, channel, 1 << 30), 1)[:, None]


@triton.jit
def ordered_pair(a, b):
    """The smaller and the larger."""
    return tl.minimum(a, b), tl.maximum(a, b)


@triton.jit
def order_key(x):
    """Floats as integers of the same order; every NaN is the same, and largest."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN_KEY, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def from_order_key(key):
    """Inverse of :func:`order_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def picked(bits):
    """The one float that a row holds as bits, zero elsewhere: [T, W] -> [T, 1]."""
    return tl.sum(bits, 1)[:, None].to(tl.float32, bitcast=True)


@triton.jit
def stage_of(x, here):
    """The sixteen channels [T, 16] of ``x`` [T, W] where ``here`` is true."""
    tokens: tl.constexpr = x.shape[0]
    stages: tl.constexpr = x.shape[1] // 16
    bits = tl.where(here, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits.reshape([tokens, stages, 16]), 1).to(tl.float32, bitcast=True)


@triton.jit
def spread(x, WIDTH: tl.constexpr):
    """[T, 16] repeated to [T, WIDTH]."""
    tokens: tl.constexpr = x.shape[0]
    return tl.broadcast_to(x[:, None, :], [tokens, WIDTH // 16, 16]).reshape([tokens, WIDTH])


@triton.jit
def quotient(a, b, reciprocal, FUSED: tl.constexpr):
    """``a / b``, correctly rounded unless it underflows; infinities and NaN as in a division.

    ``reciprocal`` is the correctly rounded ``1 / b`` (Markstein's division: two corrections).
    Without ``FUSED``, where ``tl.fma`` rounds twice, a plain division.
    """
    if FUSED:
        first = a * reciprocal
        q = tl.fma(tl.fma(-b, first, a), reciprocal, first)
        q = tl.fma(tl.fma(-b, q, a), reciprocal, q)
        return tl.where((tl.abs(first) < float("inf")) & (first != 0.0), q, first)
    return tl.div_rn(a, b)


@triton.jit
def cell(x):
    """The half-unit cell of ``x`` in a table of 512; NaN is in the first."""
    x = tl.floor(clamped(tl.where(x != x, -128.0, x), -128.0, 127.5) * 2.0)
    return x.to(tl.int32) + 256
