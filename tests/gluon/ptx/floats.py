"""Floating-point instructions, single and packed: opcode -> what it makes of its sources' lanes.

All that PTX defines to the bit is computed to the bit, but for the payload of a NaN. Approximations
are replaced by exact functions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from tests.gluon.ptx.integers import COMPARISONS, Pure, signed
from tests.gluon.ptx.operands import Lanes

SMALLEST = np.float32(2.0**-126)
"""Below it numbers are denormal, and .ftz makes zeros of them."""


def _single(x: Lanes) -> Lanes:
    return x.view(np.float32)


def _half(x: Lanes) -> Lanes:
    return x.view(np.float16)


def _bits(x: Lanes) -> Lanes:
    return np.asarray(x, np.float32).view(np.uint32)


def _on_singles(function: Callable[..., Lanes]) -> Callable[..., Lanes]:
    return lambda *xs: _bits(function(*(_single(x) for x in xs)))


def _flush(x: Lanes) -> Lanes:
    return np.where(np.abs(x) < SMALLEST, np.float32(0), x)


def _approximated(function: Callable[[Lanes], Lanes]) -> Callable[..., Lanes]:
    """An .approx.ftz function, exact but for denormals."""
    return _on_singles(lambda x: _flush(function(_flush(x).astype(np.float64)).astype(np.float32)))


def _fused(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
    """Rounded once: the product is exact in float64, and the sum is rounded to odd there, which
    tells which side of a tie it is on."""
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    step = np.where((lost > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + step, bits).view(np.float64).astype(x.dtype)


def _doubles(x: Lanes) -> Lanes:
    return x.view(np.float64)


def _on_halves(function: Callable[..., Lanes]) -> Callable[..., Lanes]:
    """An operation on float16, packed or not: results are rounded once."""

    def run(*xs: Lanes) -> Lanes:
        wide = (x.view(np.float16).astype(np.float64) for x in xs)
        return function(*wide).astype(np.float16).view(xs[0].dtype)

    return run


def _pack(high: Lanes, low: Lanes) -> Lanes:
    """``cvt.f16x2.f32``: the first source becomes the upper half."""
    both = np.stack([_single(low), _single(high)], 1).astype(np.float16)
    return both.view(np.uint32)[:, 0]


def _to_bfloat(x: Lanes) -> Lanes:
    """The upper half of a float32, ties to even."""
    odd = x >> np.uint32(16) & np.uint32(1)
    rounded = (x + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(_single(x)), 0x7FFF, rounded).astype(np.uint16)


def _to_integer(x: Lanes) -> Lanes:
    """To the nearest integer, saturated; NaN gives 0."""
    limits = np.clip(np.nan_to_num(np.rint(_single(x).astype(np.float64))), -(2**31), 2**31 - 1)
    return limits.astype(np.int32).view(np.uint32)


def _largest_or_nan(x: Lanes, y: Lanes) -> Lanes:
    """``max.NaN.f16x2``: any NaN gives the canonical one."""
    both = np.maximum(x.view(np.float16), y.view(np.float16))
    return np.where(np.isnan(both), np.uint16(0x7FFF), both.view(np.uint16)).view(np.uint32)


def _equal_halves(x: Lanes, y: Lanes) -> Lanes:
    """``set.eq.f16x2``: ones where halves are equal."""
    equal = x.view(np.float16) == y.view(np.float16)
    return equal.astype(np.float16).view(np.uint32)


def _float_table() -> dict[str, Pure]:
    table: dict[str, Pure] = {}
    binary: dict[str, Callable[..., Lanes]] = {
        "add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": np.fmin,
        "max": np.fmax,
    }  # fmt: skip
    for name, f in binary.items():
        for rounding in ("", ".rn"):
            table[f"{name}{rounding}.f32"] = Pure(_on_singles(f), ("word",) * 2)
            table[f"{name}{rounding}.f16x2"] = Pure(_on_halves(f), ("word",) * 2)
            table[f"{name}{rounding}.f16"] = Pure(_on_halves(f), ("half",) * 2)
    table["fma.rn.f32"] = Pure(_on_singles(_fused), ("word",) * 3)
    table["fma.rn.f16x2"] = Pure(_on_halves(_fused), ("word",) * 3)
    table["max.NaN.f16x2"] = Pure(_largest_or_nan, ("word",) * 2)
    add_doubles = Pure(lambda x, y: (_doubles(x) + _doubles(y)).view(np.uint64), ("long",) * 2)
    table["add.f64"] = table["add.rn.f64"] = add_doubles
    table["sqrt.rn.f32"] = Pure(_on_singles(np.sqrt), ("word",))
    for rounding in ("full", "rn"):
        table[f"div.{rounding}.f32"] = Pure(_on_singles(operator.truediv), ("word",) * 2)
    table["neg.f32"] = Pure(lambda x: x ^ np.uint32(1 << 31), ("word",))
    table["neg.f16x2"] = Pure(lambda x: x ^ np.uint32(0x80008000), ("word",))
    table["abs.f32"] = Pure(lambda x: x & np.uint32(0x7FFFFFFF), ("word",))
    approximations: dict[str, Callable[[Lanes], Lanes]] = {
        "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "rcp": np.reciprocal,
    }  # fmt: skip
    for name, function in approximations.items():
        table[f"{name}.approx.ftz.f32"] = Pure(_approximated(function), ("word",))
    return table | _conversion_table() | _float_comparisons()


def _conversion_table() -> dict[str, Pure]:
    return {
        "cvt.rn.f32.s32": Pure(lambda x: _bits(signed(x).astype(np.float32)), ("word",)),
        "cvt.rn.f32.u32": Pure(lambda x: _bits(x.astype(np.float32)), ("word",)),
        "cvt.f32.f16": Pure(lambda x: _bits(x.view(np.float16).astype(np.float32)), ("half",)),
        "cvt.f64.f32": Pure(lambda x: _single(x).astype(np.float64).view(np.uint64), ("word",)),
        "cvt.rn.f32.f64": Pure(lambda x: _bits(_doubles(x).astype(np.float32)), ("long",)),
        "cvt.f32.bf16": Pure(lambda x: x.astype(np.uint32) << np.uint32(16), ("half",)),
        "cvt.rn.bf16.f32": Pure(_to_bfloat, ("word",)),
        "cvt.rn.f16.f32": Pure(lambda x: _single(x).astype(np.float16).view(np.uint16), ("word",)),
        "cvt.rn.f16.s32": Pure(lambda x: signed(x).astype(np.float16).view(np.uint16), ("word",)),
        "cvt.rn.f16x2.f32": Pure(_pack, ("word",) * 2),
        "cvt.rni.s32.f32": Pure(_to_integer, ("word",)),
        "set.eq.f16x2.f16x2": Pure(_equal_halves, ("word",) * 2),
    }


def _float_comparisons() -> dict[str, Pure]:
    """Ordered ones are false where a side is NaN; those that end in u are true."""
    table: dict[str, Pure] = {}
    for type_name, view, kind in (("f32", _single, "word"), ("f16", _half, "half")):
        table |= _comparisons_of(type_name, view, kind)
    return table


def _comparisons_of(type_name: str, view: Callable[[Lanes], Lanes], kind: str) -> dict[str, Pure]:
    table: dict[str, Pure] = {}

    def unknown(x: Lanes, y: Lanes) -> Lanes:
        return np.isnan(view(x)) | np.isnan(view(y))

    table[f"setp.nan.{type_name}"] = Pure(unknown, (kind,) * 2)
    table[f"setp.num.{type_name}"] = Pure(lambda x, y: ~unknown(x, y), (kind,) * 2)
    for name, f in COMPARISONS.items():

        def ordered(x: Lanes, y: Lanes, f=f) -> Lanes:  # type: ignore[no-untyped-def]
            return f(view(x), view(y)) & ~unknown(x, y)

        def unordered(x: Lanes, y: Lanes, f=f) -> Lanes:  # type: ignore[no-untyped-def]
            return f(view(x), view(y)) | unknown(x, y)

        table[f"setp.{name}.{type_name}"] = Pure(ordered, (kind,) * 2)
        table[f"setp.{name}u.{type_name}"] = Pure(unordered, (kind,) * 2)
    return table


FLOATS = _float_table()
