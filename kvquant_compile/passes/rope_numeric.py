"""The plain reference of a proved rotary embedding, in the model's own arithmetic."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvquant_compile.plan import RopeSpec


def apply_rope(x: Tensor, positions: Tensor, spec: RopeSpec) -> Tensor:
    """Rotate head vectors: angle = float32 position times float32 frequency, as models do it.

    Args:
        x: [..., S, width], any floating dtype; computed in float32.
        positions: integers, broadcastable to x's shape without the last axis: [S], or
            [B, 1, S] for x [B, H, S, width].
        spec: the rotation.

    Returns:
        float32, shape of x.
    """
    cos, sin = rope_tables(positions, spec)
    in_a, in_b, out_a, out_b, keep_in, keep_out = (
        torch.tensor(channels, dtype=torch.long, device=x.device) for channels in _columns(spec)
    )
    x = x.float()
    a, b = x[..., in_a], x[..., in_b]
    out = torch.empty_like(x)
    out[..., out_a] = cos * a - sin * b
    out[..., out_b] = sin * a + cos * b
    out[..., keep_out] = x[..., keep_in]
    return out


def rope_tables(positions: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
    """scale*cos and scale*sin, float32 [*positions.shape, pairs]."""
    frequencies = torch.tensor(spec.frequencies, dtype=torch.float32, device=positions.device)
    angle = positions[..., None].float() * frequencies
    return angle.cos() * spec.scale, angle.sin() * spec.scale


@lru_cache(maxsize=256)
def _columns(spec: RopeSpec) -> tuple[tuple[int, ...], ...]:
    groups = (spec.in_pairs, spec.out_pairs, spec.passthrough)
    return tuple(tuple(item[side] for item in pairs) for pairs in groups for side in (0, 1))
