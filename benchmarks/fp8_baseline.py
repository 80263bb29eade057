"""Split-KV decode attention over an FP8 (e4m3) cache: the peer that SDPA does not have.

Keys lie token by token, values transposed in blocks of 128 tokens, so that both are read along
the axis that the matrix product sums over. Products are float16 with float32 sums; the softmax
scale is folded into the query. Two orders of the product (``COLUMNS``: the cache is the left
operand) in several block sizes; the fastest of them at every size is what counts.
"""

# mypy: ignore-errors
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.cases import Size
from benchmarks.contenders import Contender

VALUE_BLOCK = 128


@triton.jit
def _decode(q, k, v, partial_sum, lse, tokens, share, splits, q_scale, REP: tl.constexpr,
            ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
            EVEN: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, d, j = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK)
    blocks = tl.cdiv(tokens, V_BLOCK)
    k += head * tokens * D
    v += head * blocks * V_BLOCK * D
    query = tl.load(q + (head * REP + r[:, None]) * D + d[None, :], mask=r[:, None] < REP,
                    other=0.0)  # fmt: skip
    query = (query.to(tl.float32) * q_scale).to(tl.float16)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    first = split * share
    end = tl.minimum(first + share, tokens)
    if COLUMNS:
        query = tl.trans(query)
        total = tl.zeros([D, ROWS], tl.float32)
    else:
        total = tl.zeros([ROWS, D], tl.float32)
    for n in tl.range(first, end, BLOCK):
        at = n + j
        in_block = tl.multiple_of((n // V_BLOCK) * V_BLOCK * D + n % V_BLOCK, 16)
        if COLUMNS:
            keys = k + at[:, None] * D + d[None, :]
            values = v + in_block + d[:, None] * V_BLOCK + j[None, :]
            keys = tl.load(keys) if EVEN else tl.load(keys, mask=at[:, None] < tokens, other=0.0)
            x = tl.dot(keys.to(tl.float16), query)
            x = x if EVEN else tl.where(at[:, None] < tokens, x, float("-inf"))
            grown = tl.maximum(peak, tl.max(x, 0))
            p = tl.exp2(x - grown[None, :])
            decay = tl.exp2(peak - grown)
            mass = mass * decay + tl.sum(p, 0)
            weights = tl.load(values).to(tl.float16)
            total = tl.dot(weights, p.to(tl.float16), total * decay[None, :])
        else:
            keys = k + at[None, :] * D + d[:, None]
            values = v + in_block + d[None, :] * V_BLOCK + j[:, None]
            keys = tl.load(keys) if EVEN else tl.load(keys, mask=at[None, :] < tokens, other=0.0)
            x = tl.dot(query, keys.to(tl.float16))
            x = x if EVEN else tl.where(at[None, :] < tokens, x, float("-inf"))
            grown = tl.maximum(peak, tl.max(x, 1))
            p = tl.exp2(x - grown[:, None])
            decay = tl.exp2(peak - grown)
            mass = mass * decay + tl.sum(p, 1)
            weights = tl.load(values).to(tl.float16)
            total = tl.dot(p.to(tl.float16), weights, total * decay[:, None])
        peak = grown
    at = (head * splits + split) * ROWS + r
    empty = mass == 0
    over = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, mass))
    tl.store(lse + at, tl.where(empty, float("-inf"), peak + tl.log2(mass)))
    if COLUMNS:
        tl.store(partial_sum + at[None, :] * D + d[:, None], total * over[None, :])
    else:
        tl.store(partial_sum + at[:, None] * D + d[None, :], total * over[:, None])


@triton.jit
def _merge(partial_sum, lse, out, splits, REP: tl.constexpr, ROWS: tl.constexpr,
           D: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    at = (head * splits + s) * ROWS + row
    x = tl.load(lse + at, mask=s < splits, other=float("-inf"))
    weight = tl.exp2(x - tl.max(x, 0))
    parts = tl.load(partial_sum + at[:, None] * D + d[None, :], mask=(s < splits)[:, None],
                    other=0.0)  # fmt: skip
    result = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (head * REP + row) * D + d, result.to(out.dtype.element_ty))


@dataclass(frozen=True)
class Setting:
    """How the kernel is compiled and split.

    Attributes:
        columns: the cache is the left operand of both products.
        block: tokens of an iteration.
        warps, stages: of Triton's launch.
        waves: programs a multiprocessor to aim at.
    """

    columns: bool
    block: int
    warps: int
    stages: int
    waves: int

    @property
    def name(self) -> str:
        """For the record."""
        order = "columns" if self.columns else "rows"
        return f"{order} {self.block}, {self.warps} warps, {self.stages} stages, {self.waves} waves"


SETTINGS = (
    Setting(True, 64, 2, 4, 4),
    Setting(True, 128, 4, 3, 3),
    Setting(False, 64, 4, 4, 3),
    Setting(False, 64, 4, 3, 4),
    Setting(False, 128, 4, 3, 3),
)


def decode(q: Tensor, k: Tensor, v: Tensor, tokens: int, setting: Setting) -> Tensor:
    """Attention of one query of every sequence.

    Args:
        q: float16 [B, Hq, 1, D].
        k: float8_e4m3fn [B, H, N, D].
        v: float8_e4m3fn [B, H, N / 128, D, 128].
        tokens: N, before padding to blocks.
        setting: one of :data:`SETTINGS`.

    Returns:
        float16 [B, Hq, 1, D].
    """
    batch, query_heads, _, dim = q.shape
    programs = batch * k.shape[1]
    rep = query_heads // k.shape[1]
    rows = max(8 if setting.columns else 16, triton.next_power_of_2(rep))
    compute = 2
    if q.is_cuda:
        compute = torch.cuda.get_device_properties(q.device).multi_processor_count
    wanted = max(1, setting.waves * compute // programs)
    share = max(VALUE_BLOCK, -(-tokens // wanted // VALUE_BLOCK) * VALUE_BLOCK)
    splits = -(-tokens // share)
    sums = torch.empty(programs, splits, rows, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(programs, splits, rows, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    _decode[(programs, splits)](
        q, k, v, sums, lse, tokens, share, splits, dim**-0.5 * math.log2(math.e),
        REP=rep, ROWS=rows, D=dim, BLOCK=setting.block, V_BLOCK=VALUE_BLOCK,
        EVEN=tokens % VALUE_BLOCK == 0, COLUMNS=setting.columns,
        num_warps=setting.warps, num_stages=setting.stages,
    )  # fmt: skip
    _merge[(programs, rep)](sums, lse, out, splits, REP=rep, ROWS=rows, D=dim,
                            SPLITS=triton.next_power_of_2(splits), num_warps=4)  # fmt: skip
    return out


def fp8(size: Size, device: torch.device) -> Contender:
    """The baseline on random caches, in all its settings."""
    blocks = -(-size.tokens // VALUE_BLOCK)
    lead = (size.sets(size.dense_bytes(1)), size.batch, size.kv_heads)
    k = random_e4m3((*lead, size.tokens, size.dim), device)
    v = random_e4m3((*lead, blocks, size.dim, VALUE_BLOCK), device)
    where: dict[str, Any] = {"device": device, "dtype": torch.float16}
    q = torch.randn(size.batch, size.query_heads, 1, size.dim, **where)

    def calls(setting: Setting) -> list:
        return [
            partial(decode, q, keys, values, size.tokens, setting)
            for keys, values in zip(k, v, strict=True)
        ]

    return Contender([], size.dense_bytes(1), {s.name: calls(s) for s in SETTINGS})


def random_e4m3(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normal numbers in e4m3, made in pieces so that no large float tensor exists."""
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    for part in out.view(-1).split(2**28):
        part.copy_(torch.randn(part.shape, device=device, dtype=torch.float16))
    return out
