"""Floating-point instructions, single and packed: opcode -> what it makes of its sources' lanes.

Fused multiply-adds go through float64, which rounds twice and differs from a device by less than
a unit in the last place in rare cases. Approximations are replaced by exact functions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from tests.hopper.ptx.integers import COMPARISONS, Pure, signed
from tests.hopper.ptx.operands import Lanes

SMALLEST = np.float32(2.0**-126)
"""Below it numbers are denormal, and .ftz makes zeros of them."""


def _single(x: Lanes) -> Lanes:
    return x.view(np.float32)


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
    return (x.astype(np.float64) * y + z).astype(x.dtype)


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


def _to_integer(x: Lanes) -> Lanes:
    """To the nearest integer, saturated; NaN gives 0."""
    limits = np.clip(np.nan_to_num(np.rint(_single(x).astype(np.float64))), -(2**31), 2**31 - 1)
    return limits.astype(np.int32).view(np.uint32)


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
        "cvt.rn.f16.f32": Pure(lambda x: _single(x).astype(np.float16).view(np.uint16), ("word",)),
        "cvt.rn.f16.s32": Pure(lambda x: signed(x).astype(np.float16).view(np.uint16), ("word",)),
        "cvt.rn.f16x2.f32": Pure(_pack, ("word",) * 2),
        "cvt.rni.s32.f32": Pure(_to_integer, ("word",)),
        "set.eq.f16x2.f16x2": Pure(_equal_halves, ("word",) * 2),
    }


def _float_comparisons() -> dict[str, Pure]:
    """Ordered ones are false where a side is NaN; those that end in u are true."""
    table: dict[str, Pure] = {}
    for name, f in COMPARISONS.items():

        def ordered(x: Lanes, y: Lanes, f=f) -> Lanes:  # type: ignore[no-untyped-def]
            x, y = _single(x), _single(y)
            return f(x, y) & ~(np.isnan(x) | np.isnan(y))

        def unordered(x: Lanes, y: Lanes, f=f) -> Lanes:  # type: ignore[no-untyped-def]
            x, y = _single(x), _single(y)
            return f(x, y) | np.isnan(x) | np.isnan(y)

        table[f"setp.{name}.f32"] = Pure(ordered, ("word",) * 2)
        table[f"setp.{name}u.f32"] = Pure(unordered, ("word",) * 2)
    return table


FLOATS = _float_table()
