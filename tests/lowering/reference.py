"""A slow, independent statement of what the ops compute: whole tensors, float64, no pages."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvquant_compile.codec.keys import dequantise_keys, quantise_keys
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit
from kvquant_compile.codec.values import dequantise_values, quantise_values
from kvquant_compile.plan import LayerPlan, RopeSpec


def uniform_tables(spec: CodecSpec, heads: int, key_dim: int, value_dim: int) -> LayerTables:
    """Evenly spaced tables, random channel constants."""
    tables = []
    for bits in (spec.key_bits, spec.value_bits):
        limit = table_limit(bits)
        levels = torch.linspace(-limit, limit, 2**bits).round().to(torch.int8)
        tables.append(levels.repeat(heads, 1))
    scale = (torch.rand(heads, key_dim) * 0.03 + 0.01).half().float()
    return LayerTables(
        tables[0],
        scale,
        torch.randint(-200, 200, (heads, key_dim)).float(),
        torch.rand(heads, key_dim) + 0.1,
        tables[1],
        torch.rand(heads, value_dim) + 0.5,
        torch.randn(heads, value_dim) * 0.1,
    )


def stored(
    k: Tensor, v: Tensor, tables: LayerTables | None, spec: CodecSpec
) -> tuple[Tensor, Tensor]:
    """What the cache gives back for tokens [1, H, N, D]: sinks exact, the rest quantised."""
    if tables is None:
        return k, v
    keys = dequantise_keys(quantise_keys(k, tables, spec), tables, spec)
    values = dequantise_values(quantise_values(v, tables, spec), tables, spec)
    n = spec.sink_tokens
    return torch.cat([k[:, :, :n], keys[:, :, n:]], 2), torch.cat(
        [v[:, :, :n], values[:, :, n:]], 2
    )


def rotate(x: Tensor, positions: Tensor, rope: RopeSpec | None) -> Tensor:
    """RopeSpec by its definition: x [B, H, N, D], positions [B, N]."""
    if rope is None:
        return x
    out = torch.zeros_like(x)
    for (a, b), (oa, ob), f in zip(rope.in_pairs, rope.out_pairs, rope.frequencies, strict=True):
        t = positions[:, None].float() * torch.tensor(f)
        c, s = t.cos() * rope.scale, t.sin() * rope.scale
        out[..., oa] = c * x[..., a] - s * x[..., b]
        out[..., ob] = s * x[..., a] + c * x[..., b]
    for i, o in rope.passthrough:
        out[..., o] = x[..., i]
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, plan: LayerPlan
) -> tuple[Tensor, Tensor]:
    """Float64 attention of q [B, Hq, S, D] with a bool mask [B, S, N] -> (o [B, S, Hq, D], lse)."""
    site = plan.attends[0]
    rep = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(rep, 1), v.double().repeat_interleave(rep, 1)
    scores = q.double() @ k.transpose(-1, -2) * site.scale
    if site.softcap:
        scores = torch.tanh(scores / site.softcap) * site.softcap
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def half_rope(dim: int, rotary: int, theta: float = 1e4) -> RopeSpec:
    """The usual half-split rotation of the first ``rotary`` channels."""
    n = rotary // 2
    pairs = tuple((i, i + n) for i in range(n))
    frequencies = tuple(float(f) for f in theta ** (-torch.arange(n).float() / n))
    return RopeSpec(pairs, pairs, frequencies, tuple((c, c) for c in range(rotary, dim)))


def interleaved_rope(dim: int) -> RopeSpec:
    """Adjacent channels turn together."""
    half = half_rope(dim, dim)
    pairs = tuple((2 * i, 2 * i + 1) for i in range(dim // 2))
    return replace(half, in_pairs=pairs, out_pairs=pairs, scale=1.25)
