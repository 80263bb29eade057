"""Random tables and inputs for the codec's tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvquant_compile.codec.feedback import STAGE_CHANNELS
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_table(bits: int, heads: int, seed: int) -> Tensor:
    limit = table_limit(bits)
    count = 2**bits
    if count > 2 * limit + 1:
        return torch.linspace(-limit, limit, count).round().to(torch.int8).repeat(heads, 1)
    rows = [
        torch.randperm(2 * limit + 1, generator=generator(seed + h))[:count].sort().values - limit
        for h in range(heads)
    ]
    return torch.stack(rows).to(torch.int8)


def random_feedback(heads: int, dim: int, seed: int) -> Tensor:
    matrix = torch.randint(-40, 41, (heads, dim, dim), generator=generator(seed))
    stage = torch.arange(dim) // STAGE_CHANNELS
    return (matrix * (stage[:, None] < stage[None])).to(torch.int8)


def random_tables(spec: CodecSpec, heads: int, dim: int, seed: int, feedback: bool) -> LayerTables:
    g = generator(seed)
    tables = LayerTables(
        key_table=random_table(spec.key_bits, heads, seed),
        key_scale=(torch.rand(heads, dim, generator=g) * 0.03 + 0.01).half().float(),
        key_zero=torch.randint(-300, 300, (heads, dim), generator=g).float(),
        key_weight=torch.rand(heads, dim, generator=g) + 0.1,
        value_table=random_table(spec.value_bits, heads, seed + 7),
        value_gain=torch.rand(heads, dim, generator=g) + 0.5,
        value_offset=torch.randn(heads, dim, generator=g) * 0.1,
        key_norm=torch.full((heads,), 60.0),
    )
    if not feedback:
        return tables
    matrix = random_feedback(heads, dim, seed)
    return replace(tables, key_feedback=matrix, value_feedback=matrix.clone())


def key_input(tables: LayerTables, batch: int, tokens: int, seed: int) -> Tensor:
    heads, dim = tables.key_scale.shape
    x = torch.randn(batch, heads, tokens, dim, generator=generator(seed)) * 60
    return (x + tables.key_zero[:, None]) * tables.key_scale[:, None]


def value_input(tables: LayerTables, batch: int, tokens: int, seed: int) -> Tensor:
    heads, dim = tables.value_gain.shape
    return torch.randn(batch, heads, tokens, dim, generator=generator(seed))


specs = st.builds(
    CodecSpec,
    key_bits=st.integers(1, 8),
    value_bits=st.integers(1, 8),
    key_slots=st.integers(0, 3),
    value_slots=st.integers(0, 3),
    key_token_scale=st.booleans(),
)
seeds = st.integers(0, 2**20)
