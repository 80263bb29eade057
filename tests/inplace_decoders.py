"""Hand-written decoders whose caches are written in place, or kept in a cache object."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, HIDDEN, HEADS, KV_HEADS, WIDTH, LONGEST = 128, 64, 4, 2, 16, 256


def _angles(width: int = WIDTH) -> Tensor:
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2)[: width // 2].float() / width)
    return torch.outer(torch.arange(LONGEST).float(), frequencies)


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(HIDDEN, 96, bias=False), nn.Linear(96, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class _ReferenceAttention(nn.Module):
    """Caches [B, S, H, D] as plain attributes; slices written and read; complex rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(HIDDEN, HEADS * WIDTH, bias=False)
        self.wk = nn.Linear(HIDDEN, KV_HEADS * WIDTH, bias=False)
        self.wv = nn.Linear(HIDDEN, KV_HEADS * WIDTH, bias=False)
        self.wo = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False)
        self.cache_k = torch.zeros(4, LONGEST, KV_HEADS, WIDTH)
        self.cache_v = torch.zeros(4, LONGEST, KV_HEADS, WIDTH)

    def forward(self, x: Tensor, start_pos: int, turns: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        xq = self._turned(self.wq(x).view(batch, length, HEADS, WIDTH), turns)
        xk = self._turned(self.wk(x).view(batch, length, KV_HEADS, WIDTH), turns)
        xv = self.wv(x).view(batch, length, KV_HEADS, WIDTH)
        self.cache_k = self.cache_k.to(xq)
        self.cache_v = self.cache_v.to(xq)
        self.cache_k[:batch, start_pos : start_pos + length] = xk
        self.cache_v[:batch, start_pos : start_pos + length] = xv
        keys = self._repeated(self.cache_k[:batch, : start_pos + length])
        values = self._repeated(self.cache_v[:batch, : start_pos + length])
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(WIDTH)
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        out = torch.matmul(scores, values).transpose(1, 2).contiguous().view(batch, length, -1)
        return self.wo(out)

    @staticmethod
    def _turned(x: Tensor, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[None, :, None]).flatten(3).type_as(x)

    @staticmethod
    def _repeated(x: Tensor) -> Tensor:
        batch, length, heads, width = x.shape
        x = x[:, :, :, None, :].expand(batch, length, heads, HEADS // KV_HEADS, width)
        return x.reshape(batch, length, HEADS, width)


class _ReferenceBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = _ReferenceAttention(), _Mlp()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x = x + self.attention(self.norm1(x), *args)
        return x + self.mlp(self.norm2(x))


class ReferenceDecoder(nn.Module):
    """``forward(tokens, start_pos: int)``; a mask only where there is more than one token."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(_ReferenceBlock() for _ in range(layers))
        self.norm, self.output = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.turns = torch.polar(torch.ones(LONGEST, WIDTH // 2), _angles())

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        _, length = tokens.shape
        x = self.embed(tokens)
        turns = self.turns[start_pos : start_pos + length]
        mask = None
        if length > 1:
            mask = torch.full((length, length), float("-inf")).triu(1)
            mask = torch.hstack([torch.zeros(length, start_pos), mask]).type_as(x)
        for layer in self.layers:
            x = layer(x, start_pos, turns, mask)
        return self.output(self.norm(x)).float()


class _Buffers(nn.Module):
    """Buffers [B, H, S, D], written at positions and returned whole."""

    def __init__(self) -> None:
        super().__init__()
        shape = (2, KV_HEADS, LONGEST, WIDTH)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.k_cache, self.v_cache
        keys[:, :, positions] = k
        values[:, :, positions] = v
        return keys, values


class _FastBlock(nn.Module):
    """A fused projection, pairs turned as stacked halves, whole buffers attended to by a mask."""

    cache: type[nn.Module] = _Buffers

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * WIDTH, bias=False)
        self.wo, self.mlp = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False), _Mlp()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.kv_cache = self.cache()

    def forward(self, x: Tensor, positions: Tensor, turns: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), positions, turns, mask)
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor, positions: Tensor, turns: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        sizes = [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
        q, k, v = (t.view(batch, length, -1, WIDTH) for t in self.wqkv(x).split(sizes, dim=-1))
        q, k, v = (t.transpose(1, 2) for t in (self.turned(q, turns), self.turned(k, turns), v))
        k, v = self.kv_cache.update(positions, k, v)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(out.transpose(1, 2).contiguous().view(batch, length, -1))

    @staticmethod
    def turned(x: Tensor, turns: Tensor) -> Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        turns = turns.view(1, x.size(1), 1, pairs.size(3), 2)
        parts = [
            pairs[..., 0] * turns[..., 0] - pairs[..., 1] * turns[..., 1],
            pairs[..., 1] * turns[..., 0] + pairs[..., 0] * turns[..., 1],
        ]
        return torch.stack(parts, -1).flatten(3).type_as(x)


class PositionsDecoder(nn.Module):
    """``forward(idx, input_pos: Tensor)``; masks and rotations looked up at the positions."""

    block: type[nn.Module] = _FastBlock

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(self.block() for _ in range(layers))
        self.norm, self.output = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        turns = torch.stack([_angles().cos(), _angles().sin()], -1)
        self.register_buffer("turns", turns, persistent=False)
        mask = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask, turns = self.mask[None, None, input_pos], self.turns[input_pos]
        x = self.embed(idx)
        for layer in self.layers:
            x = layer(x, input_pos, turns, mask)
        return self.output(self.norm(x))


class _CopyBuffers(_Buffers):
    """The same by ``index_copy_``."""

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_cache.index_copy_(2, positions, k), self.v_cache.index_copy_(2, positions, v)


class _CopyBlock(_FastBlock):
    cache = _CopyBuffers


class IndexCopyDecoder(PositionsDecoder):
    """Buffers written by ``index_copy_``."""

    block = _CopyBlock


class _ScatterBuffers(_Buffers):
    """The same by ``scatter_``."""

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        where = positions[None, None, :, None].expand_as(k)
        self.k_cache.scatter_(2, where, k)
        self.v_cache.scatter_(2, where, v)
        return self.k_cache, self.v_cache


class _ScatterBlock(_FastBlock):
    cache = _ScatterBuffers


class ScatterDecoder(PositionsDecoder):
    """Buffers written by ``scatter_``."""

    block = _ScatterBlock


class GrowingCache:
    """Keys and values by layer, grown by torch.cat."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], k], dim=2)
            self.values[layer] = torch.cat([self.values[layer], v], dim=2)
        return self.keys[layer], self.values[layer]


class StaticCache:
    """Preallocated, with a count that the decoder advances."""

    def __init__(self, layers: int = 2, batch: int = 2) -> None:
        shape = (batch, KV_HEADS, LONGEST, WIDTH)
        self.layers = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)]
        self.seen = 0

    def length(self) -> int:
        return self.seen

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        end = self.seen + k.shape[2]
        keys[:, :, self.seen : end] = k
        values[:, :, self.seen : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        self.seen += tokens


class _ObjectBlock(nn.Module):
    """Eager attention by einsum, rotated halves, grouped queries as an axis of their own."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.mlp = index, _Mlp()
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
        x = x + self.out(self.attention(self.norm1(x), cos, sin, cache))
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
        batch, length, _ = x.shape
        fused = self.qkv(x).view(batch, length, HEADS + 2 * KV_HEADS, WIDTH).permute(0, 2, 1, 3)
        q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)

        def turned(t: Tensor) -> Tensor:
            a, b = t[..., : WIDTH // 2], t[..., WIDTH // 2 :]
            return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

        q = turned(q)
        k, v = cache.update(turned(k), v, self.index)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * WIDTH**-0.5
        total = k.shape[2]
        future = torch.arange(total) > torch.arange(total - length, total)[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(batch, length, -1)


class ObjectDecoder(nn.Module):
    """``forward(ids, cache) -> logits`` with a cache that has an update method."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(_ObjectBlock(i) for i in range(layers))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.register_buffer("angles", _angles(), persistent=False)

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        start = cache.length()
        angle = self.angles[start : start + ids.shape[1]]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin(), cache)
        if hasattr(cache, "advance"):
            cache.advance(ids.shape[1])
        return self.head(self.norm(x))
