"""Device functions that put words in the order of matrix operands, see :mod:`.words`."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvquant_compile.lowering.triton.words import halves


@triton.jit
def operand(x, NATIVE: tl.constexpr):
    """A matrix operand as it is. Triton guesses an operand's layout from what it was joined
    from; an opaque move makes it take the plain fragment order, which ours is already in."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False,
            pack=32 // x.dtype.primitive_bitwidth,
        )  # fmt: skip
    return x


@triton.jit
def key_rows(k0, k1, W: tl.constexpr, NATIVE: tl.constexpr):
    """The left operand [W, 64, 16] of a slice of keys.

    Args:
        k0, k1: words [W, 32, 4, 2] (lane, tile of a chunk, r) of either half of the columns.

    Row ``16 n + 8 r + g`` is token ``4 g + 2 tile + r`` of the chunk, n = 2 chunk + tile.
    """
    x = halves(tl.join(k0, k1)).reshape([W, 8, 4, 4, 2, 2, 2])
    return operand(x.permute([0, 3, 4, 1, 5, 2, 6]).reshape([W, 64, 16]), NATIVE)


@triton.jit
def level_rows(words, W: tl.constexpr, NATIVE: tl.constexpr):
    """A left operand [W, 16, 16] of two kinds of rows: row ``8 r + g``, from a lane's words
    (kh, r), alike for all g, [W, 128]."""
    x = halves(words.reshape([W, 8, 4, 2, 2])).permute([0, 4, 1, 3, 2, 5])
    return operand(x.reshape([W, 16, 16]), NATIVE)


@triton.jit
def zero_rows(k0, k1, W: tl.constexpr, NATIVE: tl.constexpr):
    """A left operand [W, 32, 16] from words [W, 32, chunk, tile] of either half of the columns:
    row ``16 chunk + 8 tile + g``."""
    x = halves(tl.join(k0, k1)).reshape([W, 8, 4, 2, 2, 2, 2])
    return operand(x.permute([0, 3, 4, 1, 5, 2, 6]).reshape([W, 32, 16]), NATIVE)


@triton.jit
def every_row(x, W: tl.constexpr, N: tl.constexpr):
    """Something of every column [W, 8, N], alike in all rows, for 64 rows."""
    x = tl.broadcast_to(x.reshape([W, 1, 8, N]), [W, 8, 8, N])
    return x.reshape([W, 64, N])


@triton.jit
def byte_rows(r0, r1, W: tl.constexpr, NATIVE: tl.constexpr):
    """The left operand [W, 16, 64] of sixteen value channels, signed bytes of words [W, 32, 4].

    Row ``8 r + g``; column ``16 n + 4 t + 2 ih + il`` is token ``8 t + 4 ih + 2 tile + il``.
    """
    x = tl.join(r0, r1)
    b0, b1, b2, b3 = (
        x.to(tl.int8),
        (x >> 8).to(tl.int8),
        (x >> 16).to(tl.int8),
        (x >> 24).to(tl.int8),
    )
    x = tl.join(tl.join(b0, b2), tl.join(b1, b3)).reshape([W, 8, 4, 4, 2, 4])
    x = x.permute([0, 4, 1, 3, 2, 5]).reshape([W, 16, 64])
    return operand(x, NATIVE)


@triton.jit
def byte_weights(n, W: tl.constexpr, Q: tl.constexpr, NATIVE: tl.constexpr):
    """Weights int32 [W, 64, Q], -128 to 32639, in the row order of keys as two signed bytes, upper
    and lower, of the right operand of values: int8 [W, 64, 2 Q]."""
    x = tl.join(((n + 128) >> 8).to(tl.int8), n.to(tl.int8))
    x = x.reshape([W, 4, 2, 4, 2, 2 * Q]).permute([0, 1, 3, 4, 2, 5])
    return operand(x.reshape([W, 64, 2 * Q]), NATIVE)


@triton.jit
def value_rows(r0k0, r0k1, r1k0, r1k1, W: tl.constexpr, NATIVE: tl.constexpr):
    """The left operand [W, 16, 64] of sixteen value channels in halves, words [W, 32, 4].

    Row ``8 r + g``; column ``16 n + 8 ih + 2 t + il`` is token ``8 t + 4 ih + 2 tile + il``.
    """
    x = halves(tl.join(tl.join(r0k0, r1k0), tl.join(r0k1, r1k1)))  # r, kh, kl behind the tile
    x = x.reshape([W, 8, 4, 4, 2, 2, 2]).permute([0, 4, 1, 3, 5, 2, 6])
    return operand(x.reshape([W, 16, 64]), NATIVE)


@triton.jit
def right_fragment(k0, k1, W: tl.constexpr, NATIVE: tl.constexpr):
    """Eight columns [W, 16, 8] of a right operand from its fragment words."""
    x = halves(tl.join(k0, k1)).reshape([W, 8, 4, 2, 2]).permute([0, 3, 2, 4, 1])
    return operand(x.reshape([W, 16, 8]), NATIVE)


@triton.jit
def right_fragments(k0, k1, j0, j1, W: tl.constexpr, NATIVE: tl.constexpr):
    """Sixteen columns [W, 16, 16] of a right operand."""
    x = halves(tl.join(tl.join(k0, j0), tl.join(k1, j1)))  # block, kh, kl behind the lane
    x = x.reshape([W, 8, 4, 2, 2, 2]).permute([0, 4, 2, 5, 3, 1])
    return operand(x.reshape([W, 16, 16]), NATIVE)


@triton.jit
def weights_fragment(p, W: tl.constexpr, Q: tl.constexpr):
    """Weights [W, 64, Q] in the row order of keys as the right operand of :func:`value_rows`, every
    second column zero."""
    x = tl.join(p, p * 0).reshape([W, 4, 2, 4, 2, 2 * Q]).permute([0, 1, 4, 3, 2, 5])
    return x.reshape([W, 64, 2 * Q])
