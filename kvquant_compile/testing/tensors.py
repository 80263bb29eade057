"""Keys and values that look like a model's, and the ones that break quantisers; no hypothesis."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CONSTANTS = ("nothing", "channels", "tokens", "everything")


@dataclass(frozen=True)
class Profile:
    """What a tensor of keys or values [batch, heads, tokens, dim] is like.

    Attributes:
        batch, heads, tokens, dim: its shape.
        tail: degrees of freedom of Student's t; infinity is the normal distribution.
        channel_spread: deviation of the channels' log10 scales; models have about 0.3.
        offset: largest channel mean in the channel's deviations; keys before RoPE reach 13.
        outlier_channels: channels scaled up by 20.
        token_spread: deviation of the tokens' log10 scales.
        sink: factor of the first token.
        massive_tokens: tokens, anywhere, scaled up by 50.
        constant: what has a single value: "nothing", "channels" (over tokens), "tokens" (over
            channels) or "everything".
        scale: of everything; 1e-40 makes denormals, 1e30 overflows half precision.
        seed: of the draw.
    """

    batch: int = 1
    heads: int = 2
    tokens: int = 64
    dim: int = 32
    tail: float = math.inf
    channel_spread: float = 0.3
    offset: float = 3.0
    outlier_channels: int = 0
    token_spread: float = 0.1
    sink: float = 1.0
    massive_tokens: int = 0
    constant: str = "nothing"
    scale: float = 1.0
    seed: int = 0

    def tensor(self) -> Tensor:
        """A float32 tensor of this kind, always the same one."""
        g = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.heads, self.tokens, self.dim)
        x = torch.randn(shape, generator=g)
        if math.isfinite(self.tail):
            freedom = max(1, round(self.tail))
            chi = torch.randn(freedom, *shape, generator=g).square().mean(0).sqrt()
            x = x / chi.clamp_min(1e-3)
        means = (2 * torch.rand(self.heads, 1, self.dim, generator=g) - 1) * self.offset
        spread = 10 ** (self.channel_spread * torch.randn(self.heads, 1, self.dim, generator=g))
        spread[..., torch.randperm(self.dim, generator=g)[: self.outlier_channels]] *= 20
        sizes = 10 ** (self.token_spread * torch.randn(self.batch, 1, self.tokens, 1, generator=g))
        chosen = torch.randperm(self.tokens, generator=g)[: self.massive_tokens]
        sizes[:, :, chosen] *= 50
        sizes[:, :, :1] *= self.sink
        x = (x + means) * spread * sizes
        if self.constant in ("channels", "everything"):
            x = x[:, :, :1].expand(shape)
        if self.constant in ("tokens", "everything"):
            x = x[..., :1].expand(shape)
        return (x.double() * self.scale).float().contiguous()


def named_profiles(dim: int = 32, tokens: int = 64) -> dict[str, Profile]:
    """Profiles worth testing one by one, by name."""
    base = Profile(dim=dim, tokens=tokens)
    return {
        "plain": replace(base, channel_spread=0.0, offset=0.0, token_spread=0.0),
        "keys": replace(base, offset=13.0, outlier_channels=2, tail=6.0),
        "values": replace(base, offset=0.3, channel_spread=0.15, tail=8.0),
        "heavy tail": replace(base, tail=2.0),
        "sink": replace(base, sink=100.0),
        "massive tokens": replace(base, massive_tokens=3),
        "token sizes": replace(base, token_spread=0.6),
        "constant channels": replace(base, constant="channels"),
        "constant tokens": replace(base, constant="tokens"),
        "one value": replace(base, constant="everything"),
        "zeros": replace(base, scale=0.0),
        "denormals": replace(base, scale=1e-40),
        "tiny": replace(base, scale=1e-6),
        "large": replace(base, scale=100.0),
        "huge": replace(base, scale=1e30),
    }


def rotate(x: Tensor, pairs: tuple[tuple[int, int], ...], theta: float = 1e4) -> Tensor:
    """RoPE on keys [..., N, D] at positions 0, 1, ...; channels in no pair stay.

    Args:
        x: float tensor.
        pairs: channels that turn together, by falling frequency.
        theta: base of the frequencies.
    """
    first, second = torch.tensor(pairs).unbind(1)
    frequency = theta ** (-torch.arange(len(pairs), device=x.device).double() / len(pairs))
    angle = torch.arange(x.shape[-2], device=x.device).double()[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    out = x.double().clone()
    a, b = out[..., first], out[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out.to(x.dtype)


def half_pairs(dim: int) -> tuple[tuple[int, int], ...]:
    """The pairs (i, i + dim / 2) of the usual spelling."""
    return tuple((i, i + dim // 2) for i in range(dim // 2))
