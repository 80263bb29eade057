"""Keys: per-channel offline scales, one table per head, optional token scale, outlier slots.

Everything below works in table units, ``x = k / key_scale - key_zero``, where channels have
comparable spreads. The weight of a squared error there is ``key_weight key_scale**2``.
"""

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
    largest,
    to_float16,
)
from kvquant_compile.codec.spec import CodecSpec, LayerTables


@dataclass(frozen=True, eq=False)
class KeyCodes:
    """Quantised keys.

    Attributes:
        codes: uint8 [B, H, N, D].
        slot_index: uint8 (int16 above 256 channels) [B, H, N, m].
        slot_residual: float16 [B, H, N, m].
        token_scale: float16 [B, H, N], or None where the format has none.
    """

    codes: Tensor
    slot_index: Tensor
    slot_residual: Tensor
    token_scale: Tensor | None


def quantise_keys(k: Tensor, tables: LayerTables, spec: CodecSpec) -> KeyCodes:
    """Quantise keys taken before RoPE.

    Codes are the nearest levels under the stored parameters or, where the tables have
    ``key_feedback``, the ones that error feedback picks. Slots keep the elements whose weighted
    squared error under nearest levels is largest. A NaN or infinite key takes a slot and
    propagates through its residual; without slots it becomes an end level.

    Args:
        k: float [B, H, N, D].
        tables: the layer's constants.
        spec: the layer's format.
    """
    k = k.float()
    x = k / tables.key_scale[:, None] - tables.key_zero[:, None]
    a = _token_scale(x, tables, spec) if spec.key_token_scale else None
    if a is not None:
        x = x / a.float()
    codes = nearest_codes(x, tables.key_table)
    residual = k - _dense(codes, a, tables)
    index = largest(residual.square() * tables.key_weight[:, None], spec.key_slots)
    if tables.key_feedback.numel() > 0:
        codes = feedback_codes(x, tables.key_table, tables.key_feedback, index)
        residual = k - _dense(codes, a, tables)
    scale = None if a is None else a[..., 0]
    return KeyCodes(codes, index, gather_residual(residual, index), scale)


def dequantise_keys(keys: KeyCodes, tables: LayerTables, spec: CodecSpec) -> Tensor:
    """The stored keys, float32 [B, H, N, D]: ``key_scale (a table[code] + key_zero) + r``."""
    a = None if keys.token_scale is None else keys.token_scale[..., None]
    return add_residual_(_dense(keys.codes, a, tables), keys.slot_index, keys.slot_residual)


def _token_scale(x: Tensor, tables: LayerTables, spec: CodecSpec) -> Tensor:
    """Float16 token scale [B, H, N, 1], above 0: root mean square, then least squares.

    Both leave out the ``key_slots`` elements with the largest weighted error.
    """
    weight = channel_importance(tables)[:, None]
    finite = torch.nan_to_num(x, nan=0.0, posinf=FLOAT16_MAX, neginf=-FLOAT16_MAX)
    energy = finite.square() * weight
    rest = wide_sum(_without(energy, largest(energy, spec.key_slots)))
    start = (rest.sqrt() / tables.key_norm.view(-1, 1, 1)).clamp_(1e-4, FLOAT16_MAX)
    level = levels_of(nearest_codes(finite / start, tables.key_table), tables.key_table)
    error = (finite - level * start).square_().mul_(weight)
    weight = _without(weight.expand_as(x).clone(), largest(error, spec.key_slots))
    weighted = level * weight
    fit = wide_sum(weighted * finite) / wide_sum(weighted * level)
    fit = torch.nan_to_num(fit, nan=1.0) * tables.key_stretch.view(-1, 1, 1)
    return to_float16(fit.clamp_(1e-4, FLOAT16_MAX))


def channel_importance(tables: LayerTables) -> Tensor:
    """Every channel's share of the weight of errors in table units, float32 [H, D]."""
    weight = tables.key_weight * tables.key_scale.square()
    return weight / wide_sum(weight)


def wide_sum(x: Tensor) -> Tensor:
    """Sum over channels [..., D] -> [..., 1], in float64: no device's order of summation shows."""
    return x.sum(-1, keepdim=True, dtype=torch.float64).float()


def _without(x: Tensor, index: Tensor) -> Tensor:
    """``x`` [..., D] with the channels of ``index`` [..., m] set to 0, in place."""
    return x.scatter_(-1, index.long(), 0.0)


def _dense(codes: Tensor, a: Tensor | None, tables: LayerTables) -> Tensor:
    level = levels_of(codes, tables.key_table)
    if a is not None:
        level.mul_(a.float())
    return level.add_(tables.key_zero[:, None]).mul_(tables.key_scale[:, None])
