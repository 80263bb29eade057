"""Device functions on words: one 32-bit word per lane holds codes, bytes or two halves.

A tensor ``[W, 32]`` has one element per lane of each of W warps. Every function with a ``NATIVE``
argument has two bodies that give the same bits, but for approximate functions: packed PTX, and
plain arithmetic for the interpreter and for other devices.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

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
