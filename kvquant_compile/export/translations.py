"""ATen ops that torch's ONNX exporter has no translation for, or a wrong or a long one.

Standard ONNX reads no bits of a float (before opset 26), so float16 is taken apart and put
together by exact arithmetic. Shifts of bytes are unsigned here; the exporter's own are signed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvquant_compile.export.extras import need

_FLOAT, _UINT8, _INT16, _INT64, _HALF = 1, 2, 5, 7, 10  # of ONNX
_END = 2**63 - 1


def translations() -> dict[Callable, Callable]:
    """For ``torch.onnx.export(custom_translation_table=...)``, which takes plain functions."""
    aten = torch.ops.aten
    return {
        aten.view.dtype: view_dtype,
        aten.__rshift__.Scalar: shift_right,
        aten.bitwise_right_shift.Tensor_Scalar: shift_right,
        aten.__lshift__.Scalar: shift_left,
        aten.bitwise_left_shift.Tensor_Scalar: shift_left,
        aten.searchsorted.Tensor: searchsorted,
        aten.slice_scatter.default: slice_scatter,
    }


def shift_right(x: Any, count: int) -> Any:
    """Bytes shifted to the right by a constant."""
    build = _Builder()
    return build.op.BitShift(x, build.byte(count), direction="RIGHT")


def shift_left(x: Any, count: int) -> Any:
    """Bytes shifted to the left by a constant."""
    build = _Builder()
    return build.op.BitShift(x, build.byte(count), direction="LEFT")


def view_dtype(x: Any, dtype: int) -> Any:
    """The same bytes as another type: to and from uint8."""
    build, source = _Builder(), int(x.dtype)
    if dtype == _UINT8:
        if source == _UINT8:
            return build.op.Identity(x)
        bits = build.half_bits(x) if source == _HALF else build.op.Cast(x, to=_INT64)
        return build.bytes_of(bits, x)
    words = build.words(x)
    if dtype == _HALF:
        return build.half_of(words)
    assert dtype == _INT16, dtype
    return build.op.Cast(words, to=_INT16)  # channels, never negative


def searchsorted(edges: Any, x: Any, out_int32: bool = False, right: bool = False) -> Any:
    """Edges at or below every element, both [rows, n]."""
    assert right
    op = _Builder().op
    passed = op.GreaterOrEqual(op.Unsqueeze(x, [-1]), op.Unsqueeze(edges, [-2]))
    return op.ReduceSum(op.Cast(passed, to=_INT64), [-1], keepdims=0)


def slice_scatter(
    x: Any, source: Any, dim: int = 0, start: int = 0, end: int = _END, step: int = 1
) -> Any:
    """``x`` with constant places ``start`` to ``end - 1`` of an axis replaced: joined anew.

    The exporter's own translation takes twenty nodes where this takes three.
    """
    assert step == 1, step
    op, axis = _Builder().op, [dim]
    parts = [op.Slice(x, [0], [start], axis)] if start else []
    parts.append(source)
    if end < _END:
        parts.append(op.Slice(x, [end], [_END], axis))
    return op.Concat(*parts, axis=dim)


class _Builder:
    """Builds nodes of the standard operators."""

    def __init__(self) -> None:
        (onnxscript,) = need("onnxscript")
        self.op: Any = onnxscript.opset18

    def words(self, x: Any) -> Any:
        """Bytes [..., 2 n] to integers [..., n], the low byte first."""
        op = self.op
        lead = op.Slice(op.Shape(x), [0], [-1])
        pairs = op.Reshape(op.Cast(x, to=_INT64), op.Concat(lead, self._ints(-1, 2), axis=0))
        return op.ReduceSum(op.Mul(pairs, self._ints(1, 256)), [-1], keepdims=0)

    def bytes_of(self, bits: Any, like: Any) -> Any:
        """Integers [..., n] below 2**16 to bytes [..., 2 n]."""
        op = self.op
        halves = (op.Mod(bits, self._int(256)), op.Div(bits, self._int(256)))
        pairs = op.Concat(*(op.Unsqueeze(half, [-1]) for half in halves), axis=-1)
        lead = op.Slice(op.Shape(like), [0], [-1])
        return op.Cast(op.Reshape(pairs, op.Concat(lead, self._ints(-1), axis=0)), to=_UINT8)

    def half_of(self, bits: Any) -> Any:
        """Float16 of its bits: sign, five of exponent, ten of mantissa."""
        op = self.op
        exponent = op.Mod(op.Div(bits, self._int(1024)), self._int(32))
        mantissa = op.Mod(bits, self._int(1024))
        implied = op.Min(exponent, self._int(1))  # a leading one unless subnormal
        whole = op.Cast(op.Add(mantissa, op.Mul(implied, self._int(1024))), to=_FLOAT)
        unit = op.Gather(self._floats(2.0**-24, *(2.0 ** (e - 25) for e in range(1, 32))), exponent)
        finite = op.Mul(whole, unit)
        special = op.Where(op.Equal(mantissa, self._int(0)), self._float("inf"), self._float("nan"))
        size = op.Where(op.Equal(exponent, self._int(31)), special, finite)
        negative = op.GreaterOrEqual(bits, self._int(32768))
        return op.Cast(op.Where(negative, op.Neg(size), size), to=_HALF)

    def half_bits(self, x: Any) -> Any:
        """The bits of float16."""
        op = self.op
        value = op.Cast(x, to=_FLOAT)
        size = op.Abs(value)
        steps = self._floats(*(2.0**e for e in range(-14, 17)))
        passed = op.GreaterOrEqual(op.Unsqueeze(size, [-1]), steps)
        exponent = op.ReduceSum(op.Cast(passed, to=_INT64), [-1], keepdims=0)
        special = op.Equal(exponent, self._int(31))
        nan = op.IsNaN(value)
        units = self._floats(2.0**24, *(2.0 ** (25 - e) for e in range(1, 32)))
        finite = op.Where(op.Or(special, nan), self._float("0"), size)
        whole = op.Cast(op.Mul(finite, op.Gather(units, exponent)), to=_INT64)
        implied = op.Min(exponent, self._int(1))
        low = op.Add(whole, op.Mul(op.Sub(exponent, implied), self._int(1024)))
        low = op.Where(special, self._int(31 * 1024), op.Where(nan, self._int(32256), low))
        zero = self._float("0")
        negative = op.Or(op.Less(value, zero), op.Less(op.Reciprocal(value), zero))
        return op.Add(low, op.Mul(op.Cast(negative, to=_INT64), self._int(32768)))

    def _int(self, value: int) -> Any:
        return self.op.Constant(value_int=value)

    def _ints(self, *values: int) -> Any:
        return self.op.Constant(value_ints=list(values))

    def _float(self, value: str) -> Any:
        return self.op.Constant(value_float=float(value))

    def _floats(self, *values: float) -> Any:
        return self.op.Constant(value_floats=list(values))

    def byte(self, value: int) -> Any:
        return self.op.Cast(self._int(value), to=_UINT8)
