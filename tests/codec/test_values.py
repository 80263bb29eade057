from __future__ import annotations

from dataclasses import fields, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.codec.values import dequantise_values, quantise_values
from tests.codec.cases import random_tables, seeds, specs, value_input

HEADS, DIM = 2, 32


@settings(max_examples=25, deadline=None)
@given(spec=specs, seed=seeds, feedback=st.booleans())
def test_definition(spec: CodecSpec, seed: int, feedback: bool) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, feedback)
    values = quantise_values(value_input(tables, 2, 3, seed), tables, spec)
    levels = torch.stack(
        [tables.value_table[h][values.codes[:, h].long()] for h in range(HEADS)], 1
    )
    u = values.scale.double()[..., None] * levels.double() + values.zero.double()[..., None]
    u.scatter_add_(-1, values.slot_index.long(), values.slot_residual.double())
    want = tables.value_gain.double()[:, None] * u + tables.value_offset.double()[:, None]
    got = dequantise_values(values, tables, spec).double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(spec=specs, seed=seeds)
def test_nearest_levels_under_the_rounded_scale(spec: CodecSpec, seed: int) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, False)
    v = value_input(tables, 1, 4, seed)
    values = quantise_values(v, tables, spec)
    u = (v - tables.value_offset[:, None]) / tables.value_gain[:, None]
    level = tables.value_table.float()[None, :, None, :] * values.scale.float()[..., None]
    every = level + values.zero.float()[..., None]
    best = (u[..., None] - every[..., None, :]).abs().amin(-1)
    got = every.gather(-1, values.codes.long())
    torch.testing.assert_close((u - got).abs(), best, rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(spec=specs, seed=seeds, feedback=st.booleans())
def test_one_by_one_equals_at_once(spec: CodecSpec, seed: int, feedback: bool) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, feedback)
    v = value_input(tables, 2, 5, seed)
    whole = quantise_values(v, tables, spec)
    steps = [quantise_values(v[:, :, n : n + 1], tables, spec) for n in range(5)]
    for f in fields(whole):
        joined = torch.cat([getattr(step, f.name) for step in steps], 2)
        assert torch.equal(getattr(whole, f.name), joined), f.name


@settings(max_examples=15, deadline=None)
@given(spec=specs, seed=seeds, feedback=st.booleans())
def test_permuting_batch_and_tokens_permutes_codes(
    spec: CodecSpec, seed: int, feedback: bool
) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, feedback)
    v = value_input(tables, 3, 4, seed)
    rows, tokens = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    plain = dequantise_values(quantise_values(v, tables, spec), tables, spec)
    moved = dequantise_values(quantise_values(v[rows][:, :, tokens], tables, spec), tables, spec)
    assert torch.equal(moved, plain[rows][:, :, tokens])


@settings(max_examples=20, deadline=None)
@given(bits=st.integers(2, 8), slots=st.integers(0, 3), seed=seeds)
def test_uniform_error_bound(bits: int, slots: int, seed: int) -> None:
    """With even tables over the full range no element is off by more than half a step."""
    spec = CodecSpec(bits, bits, value_slots=slots)
    tables = random_tables(spec, HEADS, DIM, seed, False)
    limit = 63 if bits == 4 else 127
    even = torch.linspace(-limit, limit, 2**bits).round().to(torch.int8).repeat(HEADS, 1)
    tables = replace(tables, value_table=even)
    v = value_input(tables, 1, 4, seed)
    values = quantise_values(v, tables, spec)
    error = (dequantise_values(values, tables, spec) - v).abs() / tables.value_gain[:, None]
    step = 2 * limit / (2**bits - 1) + 1
    assert bool((error <= values.scale.float()[..., None] * (step / 2 + 0.1) + 2e-3).all())


def test_constant_and_zero_rows() -> None:
    spec = CodecSpec(2, 2)
    tables = random_tables(spec, 1, DIM, 0, True)
    for constant in (0.0, 0.75):
        u = torch.full((1, 1, 3, DIM), constant)
        v = u * tables.value_gain[:, None] + tables.value_offset[:, None]
        got = dequantise_values(quantise_values(v, tables, spec), tables, spec)
        torch.testing.assert_close(got, v, rtol=1e-3, atol=1e-3)


def test_one_outlier_takes_the_slot_and_not_the_range() -> None:
    spec = CodecSpec(4, 4)
    tables = random_tables(spec, 1, DIM, 0, False)
    v = value_input(tables, 1, 1, 0)
    quiet = quantise_values(v, tables, spec)
    v[0, 0, 0, 9] = 500.0
    loud = quantise_values(v, tables, spec)
    assert int(loud.slot_index) == 9
    assert float(loud.scale) < 2 * float(quiet.scale)
    got = dequantise_values(loud, tables, spec)
    assert abs(float(got[0, 0, 0, 9]) - 500.0) < 0.5


def test_nan_and_infinity_propagate_and_harm_no_other_token() -> None:
    spec = CodecSpec(3, 3)
    tables = random_tables(spec, 1, DIM, 0, True)
    for bad in (torch.nan, torch.inf, -torch.inf):
        v = value_input(tables, 1, 2, 0)
        v[0, 0, 1, 5] = bad
        got = dequantise_values(quantise_values(v, tables, spec), tables, spec)
        assert not bool(got[0, 0, 1, 5].isfinite())
        assert bool(got[0, 0, 0].isfinite().all())


def test_huge_values_saturate() -> None:
    spec = CodecSpec(3, 3)
    tables = random_tables(spec, 1, DIM, 0, True)
    v = value_input(tables, 1, 2, 0) * 1e30
    assert bool(dequantise_values(quantise_values(v, tables, spec), tables, spec).isfinite().all())
