"""Values: a float16 scale and zero per (token, head), one table per head, outlier slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.feedback import feedback_codes
from kvquant_compile.codec.nuq import levels_of, nearest_codes
from kvquant_compile.codec.slots import (
    FLOAT16_MAX,
    add_residual_,
    gather_residual,
    inlier_range,
    largest,
    to_float16,
)
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit


@dataclass(frozen=True, eq=False)
class ValueCodes:
    """Quantised values.

    Attributes:
        codes: uint8 [B, H, N, D].
        scale, zero: float16 [B, H, N].
        slot_index: uint8 (int16 above 256 channels) [B, H, N, m].
        slot_residual: float16 [B, H, N, m], before ``value_gain``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    slot_index: Tensor
    slot_residual: Tensor


def quantise_values(v: Tensor, tables: LayerTables, spec: CodecSpec) -> ValueCodes:
    """Quantise values.

    Codes are the nearest levels under the rounded scale and zero or, where the tables have
    ``value_feedback``, the ones that error feedback picks. The range of a token, its
    ``value_slots`` outliers left out, maps to plus and minus ``table_limit``. Ranges beyond
    float16 saturate; NaN and infinities propagate.

    Args:
        v: float [B, H, N, D].
        tables: the layer's constants.
        spec: the layer's format.
    """
    u = (v.float() - tables.value_offset[:, None]) / tables.value_gain[:, None]
    scale, zero = token_range(u, spec)
    codes, index = _codes(u, scale, zero, tables, spec)
    slot = gather_residual(u - _dense(codes, scale, zero, tables), index)
    return ValueCodes(codes, scale[..., 0], zero[..., 0], index, slot)


def dequantise_values(values: ValueCodes, tables: LayerTables, spec: CodecSpec) -> Tensor:
    """The stored values, float32 [B, H, N, D], by the definition in :mod:`.spec`."""
    dense = _dense(values.codes, values.scale[..., None], values.zero[..., None], tables)
    add_residual_(dense, values.slot_index, values.slot_residual)
    return dense.mul_(tables.value_gain[:, None]).add_(tables.value_offset[:, None])


def token_range(u: Tensor, spec: CodecSpec) -> tuple[Tensor, Tensor]:
    """Float16 scale and zero [B, H, N, 1] that map the inlier range to the table's limits."""
    low, high = inlier_range(u, spec.value_slots)
    low, high = low.clamp(-FLOAT16_MAX, FLOAT16_MAX), high.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    # Division by a number is a product with its reciprocal on some devices: make it one on all.
    step = 1 / (2 * table_limit(spec.value_bits))
    return to_float16((high - low) * step), to_float16((high + low) * 0.5)


def _codes(
    u: Tensor, scale: Tensor, zero: Tensor, tables: LayerTables, spec: CodecSpec
) -> tuple[Tensor, Tensor]:
    """Codes [B, H, N, D] and slot channels [B, H, N, m]: the elements farthest out of range."""
    step = scale.float()
    x = (u - zero.float()) / torch.where(step == 0, torch.ones_like(step), step)
    nearest = nearest_codes(x, tables.value_table)
    index = largest((x - levels_of(nearest, tables.value_table)).abs_(), spec.value_slots)
    if tables.value_feedback.numel() == 0:
        return nearest, index
    return feedback_codes(x, tables.value_table, tables.value_feedback, index), index


def _dense(codes: Tensor, scale: Tensor, zero: Tensor, tables: LayerTables) -> Tensor:
    return levels_of(codes, tables.value_table).mul_(scale.float()).add_(zero.float())
