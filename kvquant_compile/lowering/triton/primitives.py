"""Device functions on words: one 32-bit word per lane holds codes, bytes or two halves.

A tensor ``[W, 32]`` has one element per lane of each of W warps. Every function with a ``NATIVE``
argument has two bodies that give the same bits: packed PTX, and plain arithmetic for the
interpreter and for other devices.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

SPLIT_ASM = tl.constexpr("""{ .reg .b32 x, y, z; mov.b32 z, 0;
prmt.b32 x, $5, $6, $4; shr.u32 y, $4, 16; prmt.b32 y, $5, $6, y;
prmt.b32 $0, x, z, 0x4140; prmt.b32 $1, x, z, 0x4342;
prmt.b32 $2, y, z, 0x4140; prmt.b32 $3, y, z, 0x4342; }""")
SPLIT16_ASM = tl.constexpr("""{ .reg .b32 x, y, z, s, t; mov.b32 z, 0;
xor.b32 t, $4, 0x88888888; shr.u32 y, $4, 16; shr.u32 s, t, 16;
prmt.b32 x, $5, $6, $4; prmt.b32 t, $7, $8, t; or.b32 x, x, t;
prmt.b32 y, $5, $6, y; prmt.b32 s, $7, $8, s; or.b32 y, y, s;
prmt.b32 $0, x, z, 0x4140; prmt.b32 $1, x, z, 0x4342;
prmt.b32 $2, y, z, 0x4140; prmt.b32 $3, y, z, 0x4342; }""")
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
def _looked_up(low, high, table, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """Four table bytes of the codes in one half of a selector."""
    out = low * 0
    for j in tl.static_range(4):
        code = (low >> (SHIFT + 4 * j)) & 15
        if WIDE:
            code |= ((high >> (SHIFT + 4 * j)) & 15) << 4
        out |= tl.load(table + code).to(tl.int32) << (8 * j)
    return out


@triton.jit
def _spread(x):
    """Four bytes -> two words of subnormal halves, byte * 2**-24 each."""
    return (x & 0xFF) | ((x & 0xFF00) << 8), ((x >> 16) & 0xFF) | ((x >> 24) & 0xFF) << 16


@triton.jit
def levels(low, high, l0, l1, l2, l3, table, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Table entries of a selector's eight codes, as halves of entry * 2**-24.

    Args:
        low, high: the selector's low nibbles, and its high ones above 4 bits.
        l0, l1, l2, l3: the table, four bytes a word (up to 4 bits).
        table: pointer to the table, uint8.

    Returns:
        words (r=0, kh=0), (r=0, kh=1), (r=1, kh=0), (r=1, kh=1).
    """
    if NATIVE and BITS <= 3:
        return tl.inline_asm_elementwise(
            SPLIT_ASM, "=&r,=&r,=&r,=&r,r,r,r", [low, l0, l1],
            (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    if NATIVE and BITS == 4:
        return tl.inline_asm_elementwise(
            SPLIT16_ASM, "=&r,=&r,=&r,=&r,r,r,r,r,r", [low, l0, l1, l2, l3],
            (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    a, b = _spread(_looked_up(low, high, table, 0, BITS > 4))
    c, d = _spread(_looked_up(low, high, table, 16, BITS > 4))
    return a, b, c, d


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
def operand(x, NATIVE: tl.constexpr):
    """A matrix operand as it is. Triton guesses an operand's layout from what it was joined
    from; an opaque move makes it take the plain fragment order, which ours is already in."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], tl.float16, is_pure=False, pack=2
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
def value_rows(r0k0, r0k1, r1k0, r1k1, W: tl.constexpr, NATIVE: tl.constexpr):
    """The left operand [W, 16, 64] of sixteen value channels, words [W, 32, 4].

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
def weights_fragment(p, W: tl.constexpr, N: tl.constexpr):
    """Weights [W, 64, N] in the row order of keys as the right operand of values."""
    x = p.reshape([W, 4, 2, 4, 2, N]).permute([0, 1, 4, 3, 2, 5])
    return x.reshape([W, 64, N])


@triton.jit
def row_order(x, W: tl.constexpr):
    """Something of every token of a page [W, 64] in the row order of :func:`key_rows`."""
    return x.reshape([W, 2, 8, 2, 2]).permute([0, 1, 3, 4, 2]).reshape([W, 64])


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
