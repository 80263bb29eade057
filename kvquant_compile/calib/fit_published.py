"""KVQuant's tables as its paper and code fit them (arXiv 2401.18079), in this library's format.

Keys: per-channel thresholds at the 0.5 and 99.5 percentiles; one k-means table a layer, of what is
no outlier, weighted by squared gradients without the squared scale of equation 7 (as the released
code does). Values: one k-means table a layer on tokens normalised by their inlier range.

Outliers are the elements farthest out of range, a fixed number per (token, head) as with the
released ``--cap_outliers``, here 2 of each head instead of 1 %. What else lies beyond a threshold
is therefore coded: the table is fitted to it as well, and its ends lie where that needs them.
Value ranges are per (token, head) instead of per token; tables are rounded to the format's
integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.calib.fit_keys import grid
from kvquant_compile.codec.algebra.lloyd import lloyd_levels
from kvquant_compile.codec.slots import largest
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit
from kvquant_compile.codec.values import token_range

SHARE = 0.01


def fit_published(
    k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, spec: CodecSpec
) -> LayerTables:
    """Constants from float32 keys, values and gradients [H, N, D]."""
    low, high = percentiles(k, SHARE)
    half, middle = (high - low).clamp_min(1e-6) / 2, (high + low) / 2
    levels = _capped_levels((k - middle[:, None]) / half[:, None], gk, spec)
    reach = float(levels.abs().max().clamp_min(1e-6))
    limit = table_limit(spec.key_bits)
    placed = grid(half * reach / limit, middle)
    return LayerTables(
        key_table=_all_heads(levels * (limit / reach), k.shape[0]),
        key_scale=placed["key_scale"],
        key_zero=placed["key_zero"],
        key_weight=placed["key_scale"] ** -2,
        value_table=_value_table(v, gv, spec),
        value_gain=torch.ones_like(v[:, 0]),
        value_offset=torch.zeros_like(v[:, 0]),
    ).to(k.device)


def _capped_levels(x: Tensor, gradient: Tensor | None, spec: CodecSpec) -> Tensor:
    """K-means levels float32 [2**bits] of normalised keys [H, N, D] that take no slot."""
    kept = torch.ones_like(x, dtype=torch.bool)
    kept.scatter_(-1, largest(x.abs(), spec.key_slots).long(), False)
    weight = None if gradient is None else gradient.square()[kept]
    return lloyd_levels(x[kept], weight, 2**spec.key_bits)


def percentiles(x: Tensor, share: float, axis: int = 1) -> tuple[Tensor, Tensor]:
    """What ``share`` of the elements of x along an axis lie outside of, half on each side: two
    tensors of x's shape without the axis.

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
    weight = None if gradient is None else gradient.float().square()[inside]
    return lloyd_levels(x[inside], weight, 2**bits, (-1.0, 1.0))


def _value_table(v: Tensor, gradient: Tensor | None, spec: CodecSpec) -> Tensor:
    limit = table_limit(spec.value_bits)
    scale, zero = (t[0].float() for t in token_range(v[None], spec))
    x = (v - zero) / torch.where(scale == 0, 1.0, scale) / limit
    return _all_heads(inlier_levels(x, gradient, spec.value_bits) * limit, v.shape[0])


def _all_heads(table: Tensor, heads: int) -> Tensor:
    """One table for all heads, int8 [H, levels]."""
    return table.round().to(torch.int8).repeat(heads, 1)
