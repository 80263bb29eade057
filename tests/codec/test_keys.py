from __future__ import annotations

from dataclasses import fields, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.keys import KeyCodes, dequantise_keys, quantise_keys
from kvquant_compile.codec.spec import CodecSpec, LayerTables
from tests.codec.cases import key_input, random_tables, seeds, specs

HEADS, DIM = 2, 32


def reference(keys: KeyCodes, tables: LayerTables) -> torch.Tensor:
    """The definition of the dequantised key, element by element, in float64."""
    batch, heads, tokens, dim = keys.codes.shape
    out = torch.zeros(batch, heads, tokens, dim, dtype=torch.float64)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, (batch, heads, tokens))).tolist():
        a = 1.0 if keys.token_scale is None else float(keys.token_scale[b, h, n])
        level = tables.key_table[h][keys.codes[b, h, n].long()].double()
        out[b, h, n] = tables.key_scale[h].double() * (a * level + tables.key_zero[h].double())
        for c, r in zip(keys.slot_index[b, h, n], keys.slot_residual[b, h, n], strict=True):
            out[b, h, n, int(c)] += float(r)
    return out


@settings(max_examples=25, deadline=None)
@given(spec=specs, seed=seeds, feedback=st.booleans())
def test_definition(spec: CodecSpec, seed: int, feedback: bool) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, feedback)
    keys = quantise_keys(key_input(tables, 2, 3, seed), tables, spec)
    got = dequantise_keys(keys, tables, spec).double()
    torch.testing.assert_close(got, reference(keys, tables), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(spec=specs, seed=seeds)
def test_nearest_levels_under_the_stored_scale(spec: CodecSpec, seed: int) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, False)
    k = key_input(tables, 1, 4, seed)
    keys = quantise_keys(k, tables, spec)
    a = torch.ones(1, HEADS, 4) if keys.token_scale is None else keys.token_scale.float()
    level = tables.key_table.float()[:, None, None, :] * a[0][..., None, None]
    every = tables.key_scale[:, None, :, None] * (level + tables.key_zero[:, None, :, None])
    best = (k[0][..., None] - every).abs().amin(-1)
    bare = replace(keys, slot_residual=torch.zeros_like(keys.slot_residual))
    error = (k - dequantise_keys(bare, tables, spec)).abs()[0]
    torch.testing.assert_close(error, best, rtol=1e-3, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(spec=specs, seed=seeds, feedback=st.booleans())
def test_slots_are_exact_up_to_float16(spec: CodecSpec, seed: int, feedback: bool) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, feedback)
    k = key_input(tables, 1, 4, seed)
    keys = quantise_keys(k, tables, spec)
    index = keys.slot_index.long()
    error = (dequantise_keys(keys, tables, spec) - k).gather(-1, index).abs()
    bound = keys.slot_residual.float().abs() * 2**-10 + 1e-5
    assert bool((error <= bound).all())


@settings(max_examples=15, deadline=None)
@given(spec=specs, seed=seeds)
def test_slots_take_the_largest_weighted_errors(spec: CodecSpec, seed: int) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, False)
    k = key_input(tables, 1, 4, seed)
    keys = quantise_keys(k, tables, spec)
    bare = replace(keys, slot_residual=torch.zeros_like(keys.slot_residual))
    cost = (k - dequantise_keys(bare, tables, spec)).square() * tables.key_weight[:, None]
    saved = cost.gather(-1, keys.slot_index.long()).sum(-1)
    best = cost.sort(-1, descending=True).values[..., : spec.key_slots].sum(-1)
    torch.testing.assert_close(saved, best, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(spec=specs, seed=seeds, feedback=st.booleans())
def test_one_by_one_equals_at_once(spec: CodecSpec, seed: int, feedback: bool) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, feedback)
    k = key_input(tables, 2, 5, seed)
    whole = quantise_keys(k, tables, spec)
    steps = [quantise_keys(k[:, :, n : n + 1], tables, spec) for n in range(5)]
    for f in fields(whole):
        if getattr(whole, f.name) is not None:
            joined = torch.cat([getattr(step, f.name) for step in steps], 2)
            assert torch.equal(getattr(whole, f.name), joined), f.name


@settings(max_examples=15, deadline=None)
@given(spec=specs, seed=seeds, feedback=st.booleans())
def test_permuting_batch_and_tokens_permutes_codes(
    spec: CodecSpec, seed: int, feedback: bool
) -> None:
    tables = random_tables(spec, HEADS, DIM, seed, feedback)
    k = key_input(tables, 3, 4, seed)
    rows, tokens = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    plain = dequantise_keys(quantise_keys(k, tables, spec), tables, spec)
    moved = dequantise_keys(quantise_keys(k[rows][:, :, tokens], tables, spec), tables, spec)
    assert torch.equal(moved, plain[rows][:, :, tokens])


@settings(max_examples=15, deadline=None)
@given(seed=seeds, bits=st.integers(1, 7))
def test_stored_keys_quantise_to_their_own_codes(seed: int, bits: int) -> None:
    spec = CodecSpec(bits, bits, key_slots=0, value_slots=0)
    tables = random_tables(spec, HEADS, DIM, seed, False)
    keys = quantise_keys(key_input(tables, 1, 4, seed), tables, spec)
    again = quantise_keys(dequantise_keys(keys, tables, spec), tables, spec)
    assert torch.equal(keys.codes, again.codes)


def test_slot_order_means_nothing() -> None:
    spec = CodecSpec(3, 3, key_slots=3)
    tables = random_tables(spec, HEADS, DIM, 0, False)
    keys = quantise_keys(key_input(tables, 1, 4, 0), tables, spec)
    flipped = replace(
        keys, slot_index=keys.slot_index.flip(-1), slot_residual=keys.slot_residual.flip(-1)
    )
    assert torch.equal(dequantise_keys(keys, tables, spec), dequantise_keys(flipped, tables, spec))


def test_nan_and_infinity_propagate_and_harm_no_other_element() -> None:
    for scale in (False, True):
        spec = CodecSpec(3, 3, key_slots=1, key_token_scale=scale)
        tables = random_tables(spec, 1, DIM, 0, True)
        for bad in (torch.nan, torch.inf, -torch.inf):
            k = key_input(tables, 1, 2, 0)
            k[0, 0, 1, 5] = bad
            got = dequantise_keys(quantise_keys(k, tables, spec), tables, spec)
            assert not bool(got[0, 0, 1, 5].isfinite())
            others = torch.arange(DIM) != 5
            assert bool(got[0, 0, 0].isfinite().all())
            assert bool(got[0, 0, 1, others].isfinite().all())


def test_huge_and_zero_keys_stay_finite() -> None:
    for scale in (False, True):
        spec = CodecSpec(2, 2, key_slots=1, key_token_scale=scale)
        tables = random_tables(spec, 1, DIM, 0, True)
        for k in (torch.zeros(1, 1, 2, DIM), torch.full((1, 1, 2, DIM), 3e38)):
            assert bool(
                dequantise_keys(quantise_keys(k, tables, spec), tables, spec).isfinite().all()
            )
