"""A plain split-KV decode kernel over an FP8 (e4m3) cache: the baseline SDPA does not have."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _decode(q, k, v, partial, lse, scale, tokens, splits, REP: tl.constexpr, D: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(1)
    rows, d = tl.arange(0, 16), tl.arange(0, D)
    query = tl.load(q + (head * REP + rows[:, None]) * D + d[None, :], mask=(rows < REP)[:, None],
                    other=0.0)  # fmt: skip
    peak = tl.full([16], float("-inf"), tl.float32)
    mass = tl.zeros([16], tl.float32)
    total = tl.zeros([16, D], tl.float32)
    share = tl.cdiv(tl.cdiv(tokens, splits), BLOCK) * BLOCK
    first = split * share
    k += head.to(tl.int64) * tokens * D
    v += head.to(tl.int64) * tokens * D
    for n in tl.range(first, tl.minimum(first + share, tokens), BLOCK):
        at = n + tl.arange(0, BLOCK)
        inside = at < tokens
        keys = tl.load(k + at[None, :] * D + d[:, None], mask=inside[None, :], other=0.0)
        x = tl.dot(query, keys.to(tl.float16)) * scale
        x = tl.where(inside[None, :], x, float("-inf"))
        grown = tl.maximum(peak, tl.max(x, 1))
        p = tl.exp2(x - grown[:, None])
        decay = tl.exp2(peak - grown)
        values = tl.load(v + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        total = total * decay[:, None] + tl.dot(p.to(tl.float16), values.to(tl.float16))
        mass = mass * decay + tl.sum(p, 1)
        peak = grown
    at = (head * splits + split) * 16 + rows
    empty = mass == 0
    over = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, mass))
    tl.store(partial + at[:, None] * D + d[None, :], total * over[:, None])
    tl.store(lse + at, tl.where(empty, float("-inf"), peak + tl.log2(mass)))


@triton.jit
def _merge(partial, lse, out, splits, REP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    head, row = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    at = (head * splits + s) * 16 + row
    x = tl.load(lse + at, mask=s < splits, other=float("-inf"))
    weight = tl.exp2(x - tl.max(x, 0))
    parts = tl.load(partial + at[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (head * REP + row) * D + d, result.to(tl.float16))


class Fp8Decode:
    """Attention of one query over keys and values [H, N, 128] in e4m3, batch 1.

    Args:
        query: float16 [Hq, 128].
        key, value: float8_e4m3fn [H, N, 128].
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        self.q, self.k, self.v = query, key, value
        heads, tokens, dim = key.shape
        self.heads, self.tokens, self.rep = heads, tokens, query.shape[0] // heads
        self.splits = max(1, min(3 * 132 // heads, tokens // 128, 256))
        self.partial = query.new_empty(heads, self.splits, 16, dim, dtype=torch.float32)
        self.lse = query.new_empty(heads, self.splits, 16, dtype=torch.float32)
        self.out = torch.empty_like(query)

    def __call__(self) -> torch.Tensor:
        scale = 128**-0.5 * 1.4426950408889634
        _decode[(self.heads, self.splits)](
            self.q, self.k, self.v, self.partial, self.lse, scale, self.tokens, self.splits,
            REP=self.rep, D=128, BLOCK=128, num_warps=4, num_stages=3,
        )  # fmt: skip
        _merge[(self.heads, self.rep)](
            self.partial, self.lse, self.out, self.splits, REP=self.rep, D=128,
            SPLITS=triton.next_power_of_2(self.splits), num_warps=4,
        )  # fmt: skip
        return self.out
