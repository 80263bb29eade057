"""Value constants: evenly spaced tables over most of a token's range, and the feedback matrix.

A table with a lower squared error is not better by itself: attention averages independent errors
away, but levels pulled inwards shrink every token's largest elements, and that bias stays. So
k-means tables keep their ends, and how far the ends lie inside the range is measured, by width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvquant_compile.calib.levels import even_levels
from kvquant_compile.calib.nuq import histogram, lloyd
from kvquant_compile.calib.sensitivity import feedback_matrix, sensitivity
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec.spec import CodecSpec, table_limit
from kvquant_compile.codec.values import token_range

LLOYD_STEPS = 20
# With few levels, a narrower grid serves the many elements inside better; measured.
RANGE_BY_BITS = {1: 0.6, 2: 0.85, 3: 0.95}


def fit_values(
    v: Tensor, grad: Tensor | None, spec: CodecSpec, settings: FitSettings
) -> dict[str, Tensor]:
    """Value constants, by field of ``LayerTables``.

    Args:
        v: float32 [H, N, D].
        grad: float32 [H, N, D], or None.
        spec: the layer's format.
        settings: ingredients.
    """
    gain, offset = _transform(v, settings)
    limit = table_limit(spec.value_bits)
    table = even_levels(2**spec.value_bits, limit).to(v.device).repeat(v.shape[0], 1)
    if settings.value_nuq and 1 < spec.value_bits <= 4:
        table = _fixed_end_table(v, grad, gain, offset, table, spec, settings)
    constants = {
        "value_table": (table * _range(spec, settings)).round().to(torch.int8),
        "value_gain": gain,
        "value_offset": offset,
    }
    if settings.value_feedback and grad is not None:
        constants["value_feedback"] = feedback_matrix(grad, gain, settings.damping)
    return constants


def _range(spec: CodecSpec, settings: FitSettings) -> float:
    if settings.value_range is not None:
        return settings.value_range
    return RANGE_BY_BITS.get(spec.value_bits, 1.0)


def _transform(v: Tensor, settings: FitSettings) -> tuple[Tensor, Tensor]:
    """Static gain and offset [H, D] of every channel."""
    if not settings.value_transform:
        return torch.ones_like(v[:, 0]), torch.zeros_like(v[:, 0])
    spread = v.std(1)
    mean = spread.mean(1, keepdim=True)
    return torch.where(mean > 0, (spread / mean).clamp_min(1e-3), torch.ones_like(mean)), v.mean(1)


def _fixed_end_table(
    v: Tensor,
    grad: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    table: Tensor,
    spec: CodecSpec,
    settings: FitSettings,
) -> Tensor:
    """K-means levels between two fixed end levels, float [H, L]."""
    stride = max(1, -(-v.shape[1] // settings.fit_tokens))
    u = ((v - offset[:, None]) / gain[:, None])[:, ::stride]
    scale, zero = (t.float() for t in token_range(u[None], spec))
    step = scale[0].clamp_min(1e-7)
    x = (u - zero[0]) / step
    limit = table_limit(spec.value_bits)
    weight = (x.abs() <= limit * 1.001).float()
    if settings.scale_squared:
        weight = weight * step.square()
    part = sensitivity(v, grad, replace(settings, token_power=0.0)).channel * gain.square()
    weight = weight * part[:, None]
    hist = histogram(x.flatten(1), weight.flatten(1), limit * 1.002)
    for _ in range(LLOYD_STEPS):
        table = lloyd(hist, table.double(), limit * 1.002, 1).float()
        table[:, 0], table[:, -1] = -limit, limit
    return table
