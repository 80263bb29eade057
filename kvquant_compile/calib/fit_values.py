"""Value constants: evenly spaced tables over most of a token's range, static units of channels
where they pay, and the feedback matrix.

A table with a lower squared error is not better by itself: attention averages independent errors
away, but levels pulled inwards shrink every token's largest elements, and that bias stays. So
k-means tables keep their ends. How far the ends lie inside the range is searched head by head:
what is least is the expected loss, by the gradients' second moment; without gradients, the part of
the range goes by the width alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvquant_compile.calib.levels import even_levels
from kvquant_compile.calib.nuq import histogram, lloyd
from kvquant_compile.calib.sensitivity import feedback_matrix, sensitivity
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit
from kvquant_compile.codec.values import dequantise_values, quantise_values, token_range

LLOYD_STEPS = 20
CLIPS = tuple(part / 20 for part in range(20, 9, -1))
LOSS_TOKENS = 4096
# With few levels, a narrower grid serves the many elements inside better; measured.
RANGE_BY_BITS = {1: 0.6, 2: 0.85, 3: 0.95}


LEAST_ORDINARY, GREATEST_ORDINARY = 2.0**-4, 2.0**12
"""Largest values of heads that need no unit of their own for their tokens' float16 scales."""


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
    forms = (False, True) if settings.value_transform is None else (settings.value_transform,)
    fits = [_fit(v, grad, spec, replace(settings, value_transform=form)) for form in forms]
    if len(fits) == 1:
        return fits[0]
    best = torch.stack([expected_loss(v, grad, fit, spec) for fit in fits]).argmin(0)
    heads = torch.arange(v.shape[0], device=v.device)
    return {name: torch.stack([fit[name] for fit in fits], 1)[heads, best] for name in fits[0]}


def expected_loss(
    v: Tensor, grad: Tensor | None, constants: Mapping[str, Tensor], spec: CodecSpec
) -> Tensor:
    """What the errors of some values, as they are really coded, cost: float [H].

    ``e' M e`` of the errors ``e``, with M the second moment of the gradients; without gradients
    their squares.
    """
    some = v[None, :, :: max(1, -(-v.shape[1] // LOSS_TOKENS))]
    none = torch.empty(0, device=v.device)
    keys = {"key_table": none, "key_scale": none, "key_zero": none, "key_weight": none}
    tables = LayerTables(**keys, **constants)
    error = (dequantise_values(quantise_values(some, tables, spec), tables, spec) - some)[0]
    return (error * (error if grad is None else error @ _moment(grad))).sum((1, 2))


def _moment(grad: Tensor) -> Tensor:
    return grad.transpose(1, 2) @ grad


def _fit(
    v: Tensor, grad: Tensor | None, spec: CodecSpec, settings: FitSettings
) -> dict[str, Tensor]:
    """Constants with the channel transform or without it for all heads."""
    gain, offset = _transform(v, settings)
    limit = table_limit(spec.value_bits)
    table = even_levels(2**spec.value_bits, limit).to(v.device).repeat(v.shape[0], 1)
    if settings.value_nuq and 1 < spec.value_bits <= 4:
        table = _fixed_end_table(v, grad, gain, offset, table, spec, settings)
    constants = {"value_gain": gain, "value_offset": offset}
    if settings.value_feedback and grad is not None:
        constants["value_feedback"] = feedback_matrix(grad, gain, settings.damping)
    if settings.value_clip and settings.value_range is None and grad is not None:
        return constants | {"value_table": _least_lossy(v, grad, table, constants, spec)}
    part = settings.value_range or RANGE_BY_BITS.get(spec.value_bits, 1.0)
    return constants | {"value_table": _narrowed(table, part)}


def _narrowed(table: Tensor, part: float) -> Tensor:
    return (table * part).round().to(torch.int8)


def _least_lossy(
    v: Tensor, grad: Tensor, table: Tensor, constants: dict[str, Tensor], spec: CodecSpec
) -> Tensor:
    """The table int8 [H, L] over that part of the range (``CLIPS``) which costs a head least."""
    tried = [_narrowed(table, part) for part in CLIPS]
    losses = [expected_loss(v, grad, constants | {"value_table": t}, spec) for t in tried]
    best = torch.stack(losses).argmin(0)
    return torch.stack(tried, 1)[torch.arange(v.shape[0], device=v.device), best]


def _transform(v: Tensor, settings: FitSettings) -> tuple[Tensor, Tensor]:
    """Static gain and offset [H, D] of every channel."""
    if not settings.value_transform:
        return _unit(v).expand(v[:, 0].shape).contiguous(), torch.zeros_like(v[:, 0])
    spread = v.std(1)
    mean = spread.mean(1, keepdim=True)
    gain = torch.where(mean > 0, (spread / mean).clamp_min(1e-3), torch.ones_like(mean))
    return gain * _unit(v), v.mean(1)


def _unit(v: Tensor) -> Tensor:
    """A power of two [H, 1], 1 for heads whose largest value is ordinary: tokens' float16 scales
    of the others would overflow, or be subnormal and lose digits."""
    largest = v.abs().amax((1, 2))[:, None]
    ordinary = (largest == 0) | (largest >= LEAST_ORDINARY) & (largest <= GREATEST_ORDINARY)
    return torch.where(ordinary, torch.ones_like(largest), largest.log2().floor().exp2())


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
