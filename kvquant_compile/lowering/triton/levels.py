"""Device functions that look codes up: selectors to words of table bytes, see :mod:`.words`."""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvquant_compile.lowering.half_words import BYTES_AS_1024


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
