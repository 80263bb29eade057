"""More hand-written decoders, each with one spelling that the others do not have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, HIDDEN, HEADS, WIDTH, LONGEST = 128, 64, 4, 16, 256


def rotated(x: Tensor, positions: Tensor, channels: int) -> Tensor:
    """The first channels turned as halves, with angles computed at every call."""
    rates = 10000.0 ** -(torch.arange(0, channels, 2).float() / channels)
    angle = positions[:, None].float() * rates
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    turning, rest = x[..., :channels], x[..., channels:]
    a, b = turning.chunk(2, -1)
    return torch.cat([turning * cos + torch.cat([-b, a], -1) * sin, rest], -1)


class _Fused(nn.Module):
    """One projection; masks sliced from a buffer of ones; eager softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        ones = torch.ones(LONGEST, LONGEST).tril().view(1, 1, LONGEST, LONGEST)
        self.register_buffer("ones", ones, persistent=False)

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
                   for t in self.qkv(x).split(HIDDEN, 2))  # fmt: skip
        if past is not None:
            k, v = torch.cat((past[0], k), -2), torch.cat((past[1], v), -2)
        out = self.attention(q, k, v)
        return self.out(out.transpose(1, 2).contiguous().flatten(2)), (k, v)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, total = q.shape[2], k.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        hidden = self.ones[:, :, total - length : total, :total] == 0
        return F.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v


class _Bias(_Fused):
    """Scores that fall with the distance, as a float mask of sdpa."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total = k.shape[2]
        at, keys = torch.arange(total - q.shape[2], total)[:, None], torch.arange(total)[None]
        slopes = 2.0 ** -torch.arange(1, HEADS + 1).float()
        bias = (keys - at).float()[None] * slopes[:, None, None]
        bias = bias.masked_fill(keys > at, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


class _Grouped(nn.Module):
    """Norms before a partial rotation; einsum with an axis of groups; where as the mask."""

    turning = 8

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2 * WIDTH)
        self.v, self.out = nn.Linear(HIDDEN, 2 * WIDTH), nn.Linear(HIDDEN, HIDDEN)
        self.q_norm, self.k_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        q = self.q_norm(self.q(x).view(batch, length, HEADS, WIDTH)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(batch, length, 2, WIDTH)).transpose(1, 2)
        v = self.v(x).view(batch, length, 2, WIDTH).transpose(1, 2)
        start = 0 if past is None else past[0].shape[2]
        at = torch.arange(start, start + length)
        q, k = rotated(q, at, self.turning), rotated(k, at, self.turning)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = self.attention(q, k, v, torch.arange(k.shape[2])[None] <= at[:, None])
        return self.out(out.transpose(1, 2).reshape(batch, length, -1)), (k, v)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        batch, _, length, _ = q.shape
        scores = torch.einsum("bgrsd,bgtd->bgrst", q.view(batch, 2, 2, length, WIDTH), k)
        scores = torch.where(seen, scores / WIDTH**0.5, torch.finfo(scores.dtype).min)
        out = torch.einsum("bgrst,bgtd->bgrsd", scores.softmax(-1), v)
        return out.reshape(batch, HEADS, length, WIDTH)


class _Products(_Grouped):
    """bmm over batch times heads, repeated keys, a scaled query, a mask filled in place."""

    turning = 16

    def attention(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        batch, _, length, _ = q.shape
        k, v = (t.unsqueeze(2).repeat(1, 1, 2, 1, 1).view(batch * HEADS, -1, WIDTH)
                for t in (k, v))  # fmt: skip
        q = (q * WIDTH**-0.5).reshape(batch * HEADS, length, WIDTH)
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, -1)
        weights = scores.masked_fill_(~seen, -1e9).softmax(-1)
        out = torch.bmm(weights.view(batch * HEADS, length, -1), v)
        return out.view(batch, HEADS, length, WIDTH)


class _Decoder(nn.Module):
    """Tied embeddings, positions learned or none, a tuple of tuples as the cache."""

    block: type[nn.Module] = _Fused
    learned = False

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(LONGEST, HIDDEN)
        self.blocks = nn.ModuleList(self.block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, past: Any = None) -> tuple[Tensor, tuple]:
        x, start = self.embed(ids), 0 if past is None else past[0][0].size(-2)
        if self.learned:
            x = x + self.places(torch.arange(start, start + ids.size(1)))
        grown: tuple = ()
        for i, block in enumerate(self.blocks):
            out, cache = block(x, None if past is None else past[i])
            x, grown = x + out, (*grown, cache)
        return self.head(self.norm(x)), grown


class LearnedDecoder(_Decoder):
    """Learned positions, no rotation."""

    learned = True


class BiasDecoder(_Decoder):
    """ALiBi."""

    block = _Bias


class GroupedDecoder(_Decoder):
    """Groups as an axis of einsum."""

    block = _Grouped


class ProductsDecoder(_Decoder):
    """Batched matrix products."""

    block = _Products
