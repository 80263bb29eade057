"""Device functions on words: one 32-bit word per lane holds codes, bytes or two halves.

A tensor ``[W, 32]`` has one element per lane of each of W warps. Every function with a ``NATIVE``
argument has two bodies that give the same bits: packed PTX, and plain arithmetic for the
interpreter and for other devices.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvquant_compile.lowering.words import BYTES_AS_1024


def _looked_up(outputs: int, wide: bool) -> str:
    """PTX: table bytes ``x``, ``y`` of a selector's halves. Operands behind the outputs: the
    selector, and two or four words of a table.

    The upper half comes down by a product with one, which spares the busiest pipe a shift: exact,
    as nibbles up to 7 are no NaN. Sixteen entries are two tables: a permute gives 0 for nibbles of
    the other one, because its sign mode spreads the top bit of entries below 128.
    """
    s, t0, t1, t2, t3 = (f"${outputs + i}" for i in range(5))
    if not wide:
        return (
            ".reg .b32 x, y, one; .reg .b16 lo, hi; mov.b32 one, 0x3C003C00;\n"
            f"prmt.b32 x, {t0}, {t1}, {s}; mov.b32 {{lo, hi}}, {s}; mov.b32 y, {{hi, hi}};\n"
            f"mul.rn.f16x2 y, y, one; prmt.b32 y, {t0}, {t1}, y;\n"
        )
    return (
        ".reg .b32 x, y, s, t;\n"
        f"xor.b32 t, {s}, 0x88888888; shr.u32 y, {s}, 16; shr.u32 s, t, 16;\n"
        f"prmt.b32 x, {t0}, {t1}, {s}; prmt.b32 t, {t2}, {t3}, t; or.b32 x, x, t;\n"
        f"prmt.b32 y, {t0}, {t1}, y; prmt.b32 s, {t2}, {t3}, s; or.b32 y, y, s;\n"
    )


def _key_asm(wide: bool, high: int) -> Any:
    """PTX: a selector to four words of bytes with ``high`` above them."""
    text = _looked_up(4, wide) + "".join(
        f"prmt.b32 ${i}, {'xxyy'[i]}, {high}, {('0x4140', '0x4342')[i % 2]};\n" for i in range(4)
    )
    return tl.constexpr(f"{{ {text} }}")


def _value_asm(wide: bool) -> Any:
    """PTX: a selector to two words of bytes."""
    return tl.constexpr(f"{{ {_looked_up(2, wide)} mov.b32 $0, x; mov.b32 $1, y; }}")


KEY_ASM, KEY16_ASM = _key_asm(False, 0), _key_asm(True, 0)
KEY_1024_ASM, KEY16_1024_ASM = _key_asm(False, BYTES_AS_1024), _key_asm(True, BYTES_AS_1024)
VALUE_ASM, VALUE16_ASM = _value_asm(False), _value_asm(True)
ROTATE_ASM = tl.constexpr("""{ .reg .b32 t;
mul.rn.f16x2 t, $3, $5; neg.f16x2 t, t; fma.rn.f16x2 $0, $2, $4, t;
mul.rn.f16x2 t, $2, $5; fma.rn.f16x2 $1, $3, $4, t; }""")


@triton.jit
def lower_half(x):
    """The low float16 of every word."""
    return (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def upper_half(x):
    """The high float16 of every word."""
    return ((x >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def pack_halves(low, high):
    """Two floats, rounded to float16, in one word."""
    a = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    b = high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (a | (b << 16)).to(tl.int32, bitcast=True)


@triton.jit
def halves(x):
    """Words [...] -> float16 [..., 2]."""
    return tl.join(lower_half(x), upper_half(x))


@triton.jit
def double_lower(x):
    """Both halves become the low one."""
    return (x & 0xFFFF) | (x << 16)


@triton.jit
def double_upper(x):
    """Both halves become the high one."""
    y = (x >> 16) & 0xFFFF
    return y | (y << 16)


@triton.jit
def fma2(a, b, c, NATIVE: tl.constexpr):
    """``a * b + c`` of halves."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, is_pure=True, pack=1
        )
    low = lower_half(a).to(tl.float32) * lower_half(b).to(tl.float32)
    high = upper_half(a).to(tl.float32) * upper_half(b).to(tl.float32)
    return pack_halves(low + lower_half(c).to(tl.float32), high + upper_half(c).to(tl.float32))


@triton.jit
def equal2(a, b, NATIVE: tl.constexpr):
    """1.0 where halves are equal and 0.0 elsewhere."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "set.eq.f16x2.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
        )
    low = (lower_half(a) == lower_half(b)).to(tl.float32)
    high = (upper_half(a) == upper_half(b)).to(tl.float32)
    return pack_halves(low, high)


@triton.jit
def rotate2(a, b, cos, sin, NATIVE: tl.constexpr):
    """``(a cos - b sin, a sin + b cos)`` of halves."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            ROTATE_ASM, "=&r,=&r,r,r,r,r", [a, b, cos, sin], (tl.int32, tl.int32), is_pure=True,
            pack=1,
        )  # fmt: skip
    x = fma2(a, cos, fma2(b, sin, a * 0, False) ^ -2147450880, False)
    y = fma2(b, cos, fma2(a, sin, a * 0, False), False)
    return x, y


@triton.jit
def _entries(low, high, table, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """Four table bytes of the codes in one half of a selector."""
    out = low * 0
    for j in tl.static_range(4):
        code = (low >> (SHIFT + 4 * j)) & 15
        if WIDE:
            code |= ((high >> (SHIFT + 4 * j)) & 15) << 4
        out |= tl.load(table + code).to(tl.int32) << (8 * j)
    return out


@triton.jit
def _spread(x, ABOVE: tl.constexpr):
    """Four bytes -> two words of halves, with a byte above each."""
    above = (ABOVE & 0xFF) * 0x1000100
    return (x & 0xFF) | ((x & 0xFF00) << 8) | above, (
        ((x >> 16) & 0xFF) | ((x >> 24) & 0xFF) << 16 | above
    )


@triton.jit
def key_levels(
    low, high, l0, l1, l2, l3, table, ABOVE: tl.constexpr, BITS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Table entries of a selector's eight codes as halves: u * 2**-24, or 1024 + u.

    Args:
        low, high: the selector's low nibbles, and its high ones above 4 bits.
        l0, l1, l2, l3: the table, four bytes a word (up to 4 bits).
        table: pointer to the table, uint8.
        ABOVE: bytes above the table's: 0, or those of 1024.

    Returns:
        words (r=0, kh=0), (r=0, kh=1), (r=1, kh=0), (r=1, kh=1).
    """
    if NATIVE and BITS <= 3:
        ASM: tl.constexpr = KEY_ASM if ABOVE == 0 else KEY_1024_ASM
        return tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,r,r,r", [low, l0, l1],
            (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    if NATIVE and BITS == 4:
        ASM16: tl.constexpr = KEY16_ASM if ABOVE == 0 else KEY16_1024_ASM
        return tl.inline_asm_elementwise(
            ASM16, "=&r,=&r,=&r,=&r,r,r,r,r,r", [low, l0, l1, l2, l3],
            (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    a, b = _spread(_entries(low, high, table, 0, BITS > 4), ABOVE)
    c, d = _spread(_entries(low, high, table, 16, BITS > 4), ABOVE)
    return a, b, c, d


@triton.jit
def value_levels(low, high, l0, l1, l2, l3, table, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Table entries of a selector's eight codes as signed bytes, of r = 0 and r = 1; see
    :func:`key_levels`."""
    if NATIVE and BITS <= 3:
        return tl.inline_asm_elementwise(
            VALUE_ASM, "=&r,=&r,r,r,r", [low, l0, l1], (tl.int32, tl.int32), is_pure=True, pack=1
        )
    if NATIVE and BITS == 4:
        return tl.inline_asm_elementwise(
            VALUE16_ASM, "=&r,=&r,r,r,r,r,r", [low, l0, l1, l2, l3], (tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
    return _entries(low, high, table, 0, BITS > 4), _entries(low, high, table, 16, BITS > 4)


@triton.jit
def split4(x, LEAD: tl.constexpr):
    """Words [*LEAD, 4], perhaps flattened, as four tensors of shape LEAD."""
    even, odd = x.reshape(LEAD + [2, 2]).split()  # noqa: RUF005
    a, c = even.split()
    b, d = odd.split()
    return a, b, c, d


@triton.jit
def per_chunk(x, W: tl.constexpr, WIDTH: tl.constexpr):
    """Loads [2, W, 32 * WIDTH] with the chunk behind the lane: [W, 32, 2, WIDTH]."""
    return x.reshape([2, W, 32, WIDTH]).permute([1, 2, 0, 3])


@triton.jit
def joined_chunks(x, y, W: tl.constexpr, WIDTH: tl.constexpr):
    """Loads [W, 32 * WIDTH] of either chunk as [W, 32, 2, WIDTH]."""
    return tl.join(x, y).reshape([W, 32, WIDTH, 2]).permute([0, 1, 3, 2])


@triton.jit
def joined4(a, b, c, d, W: tl.constexpr):
    """Words of (chunk 0, tile 0), (0, 1), (1, 0), (1, 1) as [W, 32, 4]."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape([W, 32, 4])


@triton.jit
def joined2(a, b, W: tl.constexpr):
    """Words [W, 32, chunk] of tile 0 and tile 1 as [W, 32, 4]."""
    return tl.join(a, b).reshape([W, 32, 4])


@triton.jit
def mul2(a, b, NATIVE: tl.constexpr):
    """``a * b`` of halves."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
        )
    low = lower_half(a).to(tl.float32) * lower_half(b).to(tl.float32)
    high = upper_half(a).to(tl.float32) * upper_half(b).to(tl.float32)
    return pack_halves(low, high)


@triton.jit
def operand(x, NATIVE: tl.constexpr):
    """A matrix operand as it is. Triton guesses an operand's layout from what it was joined
    from; an opaque move makes it take the plain fragment order, which ours is already in."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], tl.float16, is_pure=False, pack=2
        )
    return x


@triton.jit
def byte_operand(x, NATIVE: tl.constexpr):
    """The same for bytes."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], tl.int8, is_pure=False, pack=4
        )
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
    return byte_operand(x, NATIVE)


@triton.jit
def byte_weights(n, W: tl.constexpr, Q: tl.constexpr, NATIVE: tl.constexpr):
    """Weights int32 [W, 64, Q], -128 to 32639, in the row order of keys as two signed bytes, upper
    and lower, of the right operand of values: int8 [W, 64, 2 Q]."""
    x = tl.join(((n + 128) >> 8).to(tl.int8), n.to(tl.int8))
    x = x.reshape([W, 4, 2, 4, 2, 2 * Q]).permute([0, 1, 3, 4, 2, 5])
    return byte_operand(x.reshape([W, 64, 2 * Q]), NATIVE)


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


@triton.jit
def logarithm(x, NATIVE: tl.constexpr):
    """To base 2, to within 2**-21 or so; what Triton calls is a polynomial on NVIDIA's GPUs."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def circle(turns, NATIVE: tl.constexpr):
    """Cosine and sine of angles in units of 2**-32 turns (int32)."""
    angle = turns.to(tl.float32) * 1.4629180792671596e-09
    if NATIVE:
        cos = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1
        )
        sin = tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1
        )
        return cos, sin
    return tl.cos(angle), tl.sin(angle)
