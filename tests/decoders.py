"""Hand-written decoders of the functional-cache convention, in several spellings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, HIDDEN, HEADS, KV_HEADS, WIDTH = 128, 64, 4, 2, 16
Cache = list[tuple[Tensor, Tensor]] | None


class _Block(nn.Module):
    """Pre-norm block; subclasses say how attention is spelled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.q = nn.Linear(HIDDEN, HEADS * WIDTH, bias=False)
        self.k = nn.Linear(HIDDEN, KV_HEADS * WIDTH, bias=False)
        self.v = nn.Linear(HIDDEN, KV_HEADS * WIDTH, bias=False)
        self.o = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False)
        self.up, self.down = nn.Linear(HIDDEN, 96), nn.Linear(96, HIDDEN)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        return (
            self.q(x).view(batch, length, HEADS, WIDTH),
            self.k(x).view(batch, length, KV_HEADS, WIDTH),
            self.v(x).view(batch, length, KV_HEADS, WIDTH),
        )

    def forward(self, x: Tensor, rope: Any, past: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, cache = self.attention(self.norm1(x), rope, past)
        x = x + self.o(out)
        return x + self.down(F.silu(self.up(self.norm2(x)))), cache

    def attention(self, x: Tensor, rope: Any, past: Any) -> Any:
        raise NotImplementedError


def _past_length(past: Any, axis: int) -> int:
    return 0 if past is None else past[0][0].shape[axis]


class _Decoder(nn.Module):
    """Embedding, blocks, head; the cache's sequence axis is ``axis``."""

    axis = 2
    block: type[_Block]

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(self.block() for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        frequencies = 1.0 / 10000 ** (torch.arange(0, WIDTH, 2).float() / WIDTH)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def rope(self, past: int, length: int) -> Any:
        raise NotImplementedError

    def forward(self, ids: Tensor, past: Cache = None) -> tuple[Tensor, Any]:
        x = self.embed(ids)
        rope = self.rope(_past_length(past, self.axis), ids.shape[1])
        grown = []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, rope, None if past is None else past[i])
            grown.append(cache)
        return self.head(self.norm(x)), grown


def _join(past: Any, k: Tensor, v: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    if past is None:
        return k, v
    return torch.cat([past[0], k], axis), torch.cat([past[1], v], axis)


class _SdpaBlock(_Block):
    """Split halves, [B, H, S, D] cache, sdpa with an explicit mask and expand for groups."""

    window = 0

    def attention(self, x: Tensor, rope: Any, past: Any) -> Any:
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        cos, sin = rope

        def turn(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        k, v = cache = _join(past, turn(k), v, 2)
        total, length = k.shape[2], x.shape[1]
        at = torch.arange(total - length, total)[:, None]
        keys = torch.arange(total)[None]
        mask = keys <= at
        if self.window:
            mask = mask & (keys > at - self.window)
        k, v = (
            t[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2) for t in (k, v)
        )
        out = F.scaled_dot_product_attention(turn(q), k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2), cache


class SdpaDecoder(_Decoder):
    """Angles computed from arange at every call."""

    block = _SdpaBlock

    def rope(self, past: int, length: int) -> Any:
        angle = torch.outer(torch.arange(past, past + length).float(), self.frequencies)
        return angle.cos(), angle.sin()


class _WindowBlock(_SdpaBlock):
    window = 6


class WindowDecoder(SdpaDecoder):
    """The same with a sliding window of 6 keys."""

    block = _WindowBlock


class _MatmulBlock(_Block):
    """Interleaved pairs as complex numbers, [B, S, H, D] cache, matmul-softmax-matmul."""

    softcap = 0.0

    def attention(self, x: Tensor, rope: Any, past: Any) -> Any:
        q, k, v = self.heads(x)

        def turn(t: Tensor) -> Tensor:
            pairs = torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * rope[:, None, :]).flatten(3).type_as(t)

        k, v = cache = _join(past, turn(k), v, 1)
        groups = HEADS // KV_HEADS
        q = turn(q).transpose(1, 2)
        k, v = (t.repeat_interleave(groups, dim=2).transpose(1, 2) for t in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(WIDTH)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        length, total = x.shape[1], k.shape[2]
        mask = torch.full((length, total), float("-inf")).triu(1 + total - length)
        weights = F.softmax((scores + mask).float(), dim=-1).type_as(q)
        return torch.matmul(weights, v).transpose(1, 2).reshape(x.shape[0], length, -1), cache


class MatmulDecoder(_Decoder):
    """Rotations looked up in a precomputed complex table."""

    block = _MatmulBlock
    axis = 1

    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers)
        angle = torch.outer(torch.arange(256).float(), self.frequencies)
        table = torch.polar(torch.ones_like(angle), angle)
        self.register_buffer("table", table, persistent=False)

    def rope(self, past: int, length: int) -> Any:
        return self.table[past : past + length]


class _CappedBlock(_MatmulBlock):
    softcap = 3.0


class CappedDecoder(MatmulDecoder):
    """The same with a soft-cap on the scores."""

    block = _CappedBlock


class _IsCausalBlock(_Block):
    """rotate_half, cos/sin tables, sdpa with is_causal at prefill only and enable_gqa."""

    def attention(self, x: Tensor, rope: Any, past: Any) -> Any:
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        cos, sin = rope

        def turn(t: Tensor) -> Tensor:
            half = torch.cat([-t[..., WIDTH // 2 :], t[..., : WIDTH // 2]], -1)
            return t * cos + half * sin

        k, v = cache = _join(past, turn(k), v, 2)
        out = F.scaled_dot_product_attention(turn(q), k, v, is_causal=past is None, enable_gqa=True)
        return out.transpose(1, 2).flatten(2), cache


class IsCausalDecoder(_Decoder):
    """Decodes one token at a time; several tokens after a past would attend to their future."""

    block = _IsCausalBlock

    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers)
        angle = torch.outer(torch.arange(256).float(), self.frequencies).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rope(self, past: int, length: int) -> Any:
        return self.cos[past : past + length], self.sin[past : past + length]


class _SeparateBlock(_Block):
    """Query and key turned by calls of their own, each with positions and frequencies."""

    @staticmethod
    def turn(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        angle = positions[:, None] * frequencies
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = torch.cos(angle), torch.sin(angle)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def attention(self, x: Tensor, rope: Any, past: Any) -> Any:
        query, key, value = (t.transpose(1, 2) for t in self.heads(x))
        positions, frequencies = rope
        query = self.turn(query, positions, frequencies)
        key = self.turn(key, positions, frequencies)
        key, value = cache = _join(past, key, value, 2)
        total, length = key.shape[2], x.shape[1]
        mask = torch.ones(length, total, dtype=torch.bool).tril(total - length)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2), cache


class SeparateDecoder(_Decoder):
    """Interleaved pairs; nothing is shared between the query's and the key's rotation."""

    block = _SeparateBlock

    def rope(self, past: int, length: int) -> Any:
        return torch.arange(past, past + length).float(), self.frequencies
