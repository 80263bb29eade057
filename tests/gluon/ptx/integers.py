"""Integer and predicate instructions: opcode -> what it makes of its sources' lanes.

Types in opcodes are those of PTX; arrays are unsigned. A second string gives the kinds of the
sources, which only immediates need.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.gluon.ptx.operands import TYPES, Lanes


@dataclass(frozen=True)
class Pure:
    """A function of its sources: lanes in, lanes out."""

    function: Callable[..., Lanes]
    kinds: tuple[str, ...]


def signed(x: Lanes) -> Lanes:
    """The same bits as signed numbers."""
    return x.view(f"i{x.itemsize}")


def _unsigned(x: Lanes) -> Lanes:
    return x.view(f"u{x.itemsize}")


def on_signed(function: Callable[..., Lanes]) -> Callable[..., Lanes]:
    """An operation on signed numbers, between bits."""
    return lambda *xs: _unsigned(function(*(signed(x) for x in xs)))


def _shift(x: Lanes, by: Lanes, function: Callable[[Lanes, Lanes], Lanes], over: Lanes) -> Lanes:
    """PTX clamps shifts; numpy leaves larger ones undefined."""
    width = 8 * x.itemsize
    shifted = function(x, np.minimum(by, width - 1).astype(x.dtype))
    return np.where(by < width, shifted, over).astype(x.dtype)


def _shl(x: Lanes, by: Lanes) -> Lanes:
    return _shift(x, by, operator.lshift, np.zeros_like(x))


def _shr(x: Lanes, by: Lanes) -> Lanes:
    return _shift(x, by, operator.rshift, np.zeros_like(x))


def _sar(x: Lanes, by: Lanes) -> Lanes:
    x = signed(x)
    return _unsigned(_shift(x, by, operator.rshift, x >> (8 * x.itemsize - 1)))


def _divide(x: Lanes, y: Lanes) -> Lanes:
    """Quotients rounded to zero; a device gives anything for a zero divisor, here -1."""
    wide, by = x.astype(np.int64), y.astype(np.int64)
    quotient = np.abs(wide) // np.maximum(np.abs(by), 1) * np.sign(wide) * np.sign(by)
    return np.where(by == 0, -1, quotient).astype(x.dtype)


def _remainder(x: Lanes, y: Lanes) -> Lanes:
    return (x - _divide(x, y) * y).astype(x.dtype)


def _bfe(x: Lanes, first: Lanes, count: Lanes) -> Lanes:
    mask = (np.uint64(1) << np.minimum(count, 32).astype(np.uint64)) - np.uint64(1)
    return (_shr(x, first) & mask.astype(np.uint32)).astype(np.uint32)


def _signed_bfe(x: Lanes, first: Lanes, count: Lanes) -> Lanes:
    """Beyond its top bit ``x`` goes on with its sign."""
    field = signed(x).astype(np.int64) >> np.minimum(first, 63).astype(np.int64)
    above = 64 - np.clip(count, 1, 63).astype(np.int64)
    return np.where(count == 0, 0, field << above >> above).astype(np.uint32)


def _lop3(x: Lanes, y: Lanes, z: Lanes, table: Lanes) -> Lanes:
    out = np.zeros_like(x)
    for k in range(8):
        if int(table[0]) >> k & 1:
            terms = [v if k & bit else ~v for v, bit in ((x, 4), (y, 2), (z, 1))]
            out |= terms[0] & terms[1] & terms[2]
    return out


def _prmt(x: Lanes, y: Lanes, selector: Lanes) -> Lanes:
    """Bytes of y:x by nibbles; a nibble's top bit asks for the byte's sign, spread."""
    source = np.stack([x, y], 1).view(np.uint8).reshape(-1, 8)
    nibbles = selector[:, None] >> np.array([0, 4, 8, 12], np.uint32) & np.uint32(15)
    chosen = np.take_along_axis(source, (nibbles & 7).astype(np.intp), 1)
    spread = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
    return np.where(nibbles & 8, spread, chosen).astype(np.uint8).view(np.uint32)[:, 0]


def _high(x: Lanes, y: Lanes) -> Lanes:
    """Upper words of products."""
    wide = np.int64 if x.dtype.kind == "i" else np.uint64
    return (x.astype(wide) * y.astype(wide) >> wide(32)).astype(x.dtype)


def _pairs(x: Lanes) -> Lanes:
    return x.view(np.uint16)


def _dot_pairs(first: int) -> Callable[..., Lanes]:
    """``dp2a``: two signed halves times the signed bytes ``first`` and the next, and a sum."""

    def run(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
        halves = np.ascontiguousarray(x).view(np.int16).reshape(-1, 2).astype(np.int64)
        chosen = np.ascontiguousarray(y).view(np.int8).reshape(-1, 4)[:, first : first + 2]
        return ((halves * chosen).sum(1) + signed(z)).astype(np.uint32)

    return run


def _relu_min(x: Lanes, y: Lanes) -> Lanes:
    return np.maximum(np.minimum(x, y), 0)


def _relu_max(x: Lanes, y: Lanes) -> Lanes:
    return np.maximum(np.maximum(x, y), 0)


COMPARISONS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


def _integer_table() -> dict[str, Pure]:
    table: dict[str, Pure] = {}
    any_sign: dict[str, Callable[..., Lanes]] = {
        "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul,
    }  # fmt: skip
    by_sign: dict[str, Callable[..., Lanes]] = {
        "min": np.minimum, "max": np.maximum, "div": _divide, "rem": _remainder,
    }  # fmt: skip
    for size, kind in ((16, "half"), (32, "word"), (64, "long")):
        for name, f in any_sign.items():
            for sign in "su":
                table[f"{name}.{sign}{size}"] = Pure(f, (kind,) * 2)
        for name, f in by_sign.items():
            table[f"{name}.s{size}"] = Pure(on_signed(f), (kind,) * 2)
            table[f"{name}.u{size}"] = Pure(f, (kind,) * 2)
        for sign in "su":
            multiply_add = Pure(lambda x, y, z: x * y + z, (kind,) * 3)
            table[f"mad.lo.{sign}{size}"] = multiply_add
        table[f"neg.s{size}"] = Pure(on_signed(operator.neg), (kind,))
        table[f"abs.s{size}"] = Pure(on_signed(np.abs), (kind,))
        table[f"shr.s{size}"] = Pure(_sar, (kind, "word"))
        for letter in "ub":
            table[f"shr.{letter}{size}"] = Pure(_shr, (kind, "word"))
        table |= _bit_table(f"b{size}", kind)
        table |= _comparison_table(size, kind)
    return table | _bit_table("pred", "pred") | _odd_table()


def _bit_table(type_name: str, kind: str) -> dict[str, Pure]:
    table = {
        f"and.{type_name}": Pure(operator.and_, (kind,) * 2),
        f"or.{type_name}": Pure(operator.or_, (kind,) * 2),
        f"xor.{type_name}": Pure(operator.xor, (kind,) * 2),
        f"not.{type_name}": Pure(operator.invert, (kind,)),
    }
    if kind != "pred":
        table[f"shl.{type_name}"] = Pure(_shl, (kind, "word"))
    return table


def _comparison_table(size: int, kind: str) -> dict[str, Pure]:
    table: dict[str, Pure] = {}
    for name, f in COMPARISONS.items():
        on_bits = Pure(f, (kind,) * 2)
        table[f"setp.{name}.u{size}"] = table[f"setp.{name}.b{size}"] = on_bits
        table[f"setp.{name}.s{size}"] = Pure(lambda x, y, f=f: f(signed(x), signed(y)), (kind,) * 2)
    return table


def _wide_table() -> dict[str, Pure]:
    """Products twice as wide as their factors."""
    table: dict[str, Pure] = {}
    for size, kind, sum_kind in ((16, "half", "word"), (32, "word", "long")):
        for sign, view in (("s", signed), ("u", _unsigned)):

            def multiply(x: Lanes, y: Lanes, view=view, size=size) -> Lanes:  # type: ignore[no-untyped-def]
                x, y = view(x), view(y)
                wide = np.dtype(f"{x.dtype.kind}{size // 4}")
                return _unsigned(x.astype(wide) * y.astype(wide))

            def multiply_add(x: Lanes, y: Lanes, z: Lanes, multiply=multiply) -> Lanes:  # type: ignore[no-untyped-def]
                return multiply(x, y) + z

            table[f"mul.wide.{sign}{size}"] = Pure(multiply, (kind,) * 2)
            table[f"mad.wide.{sign}{size}"] = Pure(multiply_add, (kind, kind, sum_kind))
    return table


def _conversion_table() -> dict[str, Pure]:
    """Conversions between sizes; of 8 bits, a wider register's lowest."""
    table: dict[str, Pure] = {}
    sizes = ((16, "half"), (32, "word"), (64, "long"))
    for sign in "su":
        for from_size, from_kind in ((8, "half"), *sizes):
            for to_size, to_kind in sizes:
                for to_sign in "su":
                    source = np.dtype(f"{'i' if sign == 's' else 'u'}{from_size // 8}")

                    def convert(x: Lanes, source=source, kind=to_kind) -> Lanes:  # type: ignore[no-untyped-def]
                        return x.astype(source).astype(TYPES[kind])

                    name = f"cvt.{to_sign}{to_size}.{sign}{from_size}"
                    table[name] = Pure(convert, (from_kind,))
    return table


def _odd_table() -> dict[str, Pure]:
    word = "word"
    high = on_signed(_high)
    return {
        "dp2a.lo.s32.s32": Pure(_dot_pairs(0), (word,) * 3),
        "dp2a.hi.s32.s32": Pure(_dot_pairs(2), (word,) * 3),
        "popc.b32": Pure(lambda x: np.bitwise_count(x).astype(np.uint32), (word,)),
        "add.s16x2": Pure(lambda x, y: (_pairs(x) + _pairs(y)).view(np.uint32), (word,) * 2),
        "bfe.s32": Pure(_signed_bfe, (word,) * 3),
        "bfe.u32": Pure(_bfe, (word,) * 3),
        "lop3.b32": Pure(_lop3, (word,) * 4),
        "prmt.b32": Pure(_prmt, (word,) * 3),
        "mul.hi.s32": Pure(high, (word,) * 2),
        "mul.hi.u32": Pure(_high, (word,) * 2),
        "mad.hi.s32": Pure(lambda x, y, z: high(x, y) + z, (word,) * 3),
        "min.relu.s32": Pure(on_signed(_relu_min), (word,) * 2),
        "max.relu.s32": Pure(on_signed(_relu_max), (word,) * 2),
    }


INTEGERS = _integer_table() | _wide_table() | _conversion_table()
