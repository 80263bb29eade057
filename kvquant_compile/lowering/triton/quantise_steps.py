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
ROUND_BITS = tl.constexpr(0x4B400000)
_DOT_ASM = tl.constexpr("""{ .reg .s32 a; mov.s32 a, 0;
dp2a.lo.s32.s32 $0, $2, $10, $1; dp2a.hi.s32.s32 a, $3, $10, a;
dp2a.lo.s32.s32 $0, $4, $11, $0; dp2a.hi.s32.s32 a, $5, $11, a;
dp2a.lo.s32.s32 $0, $6, $12, $0; dp2a.hi.s32.s32 a, $7, $12, a;
dp2a.lo.s32.s32 $0, $8, $13, $0; dp2a.hi.s32.s32 a, $9, $13, a;
add.s32 $0, $0, a; }""")


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
def error_steps(error):
    """As :func:`on_grid`, in eighths, int32."""
    error = clamped(tl.where(error != error, 0.0, error), -63.0, 63.0)
    return (error * 8.0 + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS


@triton.jit
def opaque(x, NATIVE: tl.constexpr):
    """``x`` [N] int32, of which the compiler no longer knows that it is consecutive."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=1
        )
    return x


@triton.jit
def from_lane(x, LANE: tl.constexpr):
    """Element ``LANE`` of ``x`` [32] everywhere."""
    return tl.gather(x, tl.full([32], LANE, tl.int32), 0)


@triton.jit
def _pair(total, errors, word, SHIFT: tl.constexpr):
    """``total`` plus two int16 in a word times the int8 at bits ``SHIFT`` and ``SHIFT + 8``."""
    total += ((errors << 16) >> 16) * ((word << (24 - SHIFT)) >> 24)
    return total + (errors >> 16) * ((word << (16 - SHIFT)) >> 24)


@triton.jit
def dot_errors(total, e0, e1, e2, e3, e4, e5, e6, e7, w0, w1, w2, w3, NATIVE: tl.constexpr):
    """``total`` plus sixteen errors, int16 pairs, times sixteen int8, four a word; all [32]."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            _DOT_ASM, "=&r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [total, e0, e1, e2, e3, e4, e5, e6, e7, w0, w1, w2, w3], tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip
    total = _pair(_pair(total, e0, w0, 0), e1, w0, 16)
    total = _pair(_pair(total, e2, w1, 0), e3, w1, 16)
    total = _pair(_pair(total, e4, w2, 0), e5, w2, 16)
    return _pair(_pair(total, e6, w3, 0), e7, w3, 16)


@triton.jit
def code_bytes(codes, VARIABLES: tl.constexpr):
    """Codes [1, W] as bytes: channel ``128 i + 32 j + lane`` is byte j of word ``32 i + lane``."""
    quads: tl.constexpr = (VARIABLES + 3) // 4
    each: tl.constexpr = VARIABLES // quads
    shift = 8 * tl.arange(0, each)[None, :, None]
    words = tl.sum(codes.to(tl.int32).reshape([quads, each, 32]) << shift, 1)
    return words.reshape([32 * quads])


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
