"""KVQuant's tables as its paper and code fit them (arXiv 2401.18079), in this library's format.

Keys: per-channel thresholds at the 0.5 and 99.5 percentiles; one k-means table a layer, weighted
by squared gradients without the squared scale of equation 7 (as the released code does).
Values: one k-means table a layer on tokens normalised by their inlier range. Outliers are the
elements farthest out of range; here a fixed number per (token, head) instead of 1 %, and value
ranges are per (token, head) instead of per token. Tables are rounded to the format's integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.calib.fit_keys import grid
from kvquant_compile.codec.algebra.lloyd import lloyd_levels
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit
from kvquant_compile.codec.values import token_range

SHARE = 0.01


def fit_published(
    k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, spec: CodecSpec
) -> LayerTables:
    """Constants from float32 keys, values and gradients [H, N, D]."""
    limit = table_limit(spec.key_bits)
    low, high = percentiles(k, SHARE)
    half, middle = (high - low).clamp_min(1e-6) / 2, (high + low) / 2
    x = (k - middle[:, None]) / half[:, None]
    placed = grid(half / limit, middle)
    return LayerTables(
        key_table=_table(x, gk, spec.key_bits),
        key_scale=placed["key_scale"],
        key_zero=placed["key_zero"],
        key_weight=placed["key_scale"] ** -2,
        value_table=_value_table(v, gv, spec),
        value_gain=torch.ones_like(v[:, 0]),
        value_offset=torch.zeros_like(v[:, 0]),
    ).to(k.device)


def percentiles(x: Tensor, share: float, axis: int = 1) -> tuple[Tensor, Tensor]:
    """What ``share`` of the elements along an axis lie outside of, half on each side.

    torch.quantile without its limit on the number of elements.
    """
    ordered = x.sort(axis).values
    out = []
    for end in (share / 2, 1 - share / 2):
        place = end * (x.shape[axis] - 1)
        i = min(int(place), x.shape[axis] - 2)
        a, b = ordered.select(axis, i), ordered.select(axis, i + 1)
        out.append(a + (b - a) * (place - i))
    return out[0], out[1]


def inlier_levels(x: Tensor, gradient: Tensor | None, bits: int) -> Tensor:
    """K-means levels float32 [2**bits] of the elements within [-1, 1], weighted by squared
    gradients."""
    inside = x.abs() <= 1
    weight = None if gradient is None else gradient.square()[inside]
    return lloyd_levels(x[inside], weight, 2**bits, (-1.0, 1.0))


def _value_table(v: Tensor, gradient: Tensor | None, spec: CodecSpec) -> Tensor:
    scale, zero = (t[0].float() for t in token_range(v[None], spec))
    x = (v - zero) / torch.where(scale == 0, 1.0, scale) / table_limit(spec.value_bits)
    return _table(x, gradient, spec.value_bits)


def _table(x: Tensor, gradient: Tensor | None, bits: int) -> Tensor:
    """One table of all heads, int8 [H, 2**bits], of elements normalised to [-1, 1]."""
    table = (inlier_levels(x, gradient, bits) * table_limit(bits)).round()
    return table.to(torch.int8).repeat(x.shape[0], 1)
