from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvquant_compile.calib.fit import fit_layer
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec.keys import dequantise_keys, quantise_keys
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit
from kvquant_compile.codec.values import dequantise_values, quantise_values
from kvquant_compile.errors import CalibrationError

HEADS, TOKENS, DIM = 2, 600, 32


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys with strong channel offsets and token scales, values, and low-rank gradients."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.rand(HEADS, 1, DIM, generator=g) * 2 + 0.2
    token = torch.rand(HEADS, TOKENS, 1, generator=g) + 0.5
    k = torch.randn(HEADS, TOKENS, DIM, generator=g) * spread * token
    k = k + torch.randn(HEADS, 1, DIM, generator=g) * 5
    v = torch.randn(HEADS, TOKENS, DIM, generator=g)
    basis = torch.randn(HEADS, 6, DIM, generator=g)
    gk, gv = (torch.randn(HEADS, TOKENS, 6, generator=g) @ basis for _ in range(2))
    return k, v, gk, gv


def errors(tables: LayerTables, spec: CodecSpec, k: Tensor, v: Tensor) -> tuple[float, float]:
    keys = dequantise_keys(quantise_keys(k[None], tables, spec), tables, spec)[0]
    values = dequantise_values(quantise_values(v[None], tables, spec), tables, spec)[0]
    centred = k - k.mean(1, keepdim=True)
    return (
        float((keys - k).square().mean() / centred.square().mean()),
        float((values - v).square().mean() / v.square().mean()),
    )


@settings(max_examples=12, deadline=None)
@given(
    key_bits=st.integers(1, 8),
    value_bits=st.integers(1, 8),
    scale=st.booleans(),
    gradients=st.booleans(),
)
def test_constants_satisfy_the_format(
    key_bits: int, value_bits: int, scale: bool, gradients: bool
) -> None:
    spec = CodecSpec(key_bits, value_bits, key_token_scale=scale)
    k, v, gk, gv = data()
    grads = (gk, gv) if gradients else (None, None)
    tables = fit_layer(k, v, *grads, spec, FitSettings(refine=2))
    for table, bits in ((tables.key_table, key_bits), (tables.value_table, value_bits)):
        assert table.shape == (HEADS, 2**bits)
        assert table.dtype == torch.int8
        assert int(table.abs().max()) <= table_limit(bits)
        assert bool((table.int().diff(dim=1) >= 0).all())
    assert torch.equal(tables.key_scale, tables.key_scale.half().float())
    assert bool((tables.key_scale > 0).all())
    assert torch.equal(tables.key_zero, tables.key_zero.round())
    assert float(tables.key_zero.abs().max()) <= 1024
    assert tables.value_feedback.numel() == (HEADS * DIM * DIM if gradients else 0)
    assert all(bool(t.float().isfinite().all()) for t in tables.tensors().values())


def test_more_bits_less_error() -> None:
    k, v, _, _ = data()
    got = []
    for bits in (2, 3, 4, 6, 8):
        spec = CodecSpec(bits, bits, key_token_scale=True)
        got.append(errors(fit_layer(k, v, None, None, spec), spec, k, v))
    for kind in range(2):
        series = [pair[kind] for pair in got]
        assert series == sorted(series, reverse=True)
    assert got[0][0] < 0.15
    assert got[-1][0] < 1e-3


@pytest.mark.parametrize("factor", [2.0**-22, 2.0**26])
def test_values_of_any_size_are_stored_equally_well(factor: float) -> None:
    """Their float16 scales neither overflow nor lose digits."""
    k, v, gk, gv = data()
    spec = CodecSpec(3, 3, 0, 1)
    plain = errors(fit_layer(k, v, gk, gv, spec, FitSettings()), spec, k, v)
    far = errors(fit_layer(k, v * factor, gk, gv, spec, FitSettings()), spec, k, v * factor)
    assert far[1] == pytest.approx(plain[1], rel=0.05)


def test_token_scale_helps_keys_of_varying_size() -> None:
    k, v, _, _ = data()
    with_scale, without = CodecSpec(2, 2, key_token_scale=True), CodecSpec(2, 2)
    assert (
        errors(fit_layer(k, v, None, None, with_scale), with_scale, k, v)[0]
        < errors(fit_layer(k, v, None, None, without), without, k, v)[0]
    )


def test_every_switch_changes_the_tables() -> None:
    k, v, gk, gv = data()
    spec = CodecSpec(3, 2, key_token_scale=True)
    base = fit_layer(k, v, gk, gv, spec).tensors()
    plain = FitSettings()
    for name, value in {
        "key_nuq": False,
        "value_nuq": True,
        "sensitivity": False,
        "channel_power": 0.0,
        "token_power": 0.0,
        "scale_squared": False,
        "refine": 0,
        "stretch": 0.0,
        "value_transform": True,
        "value_range": 0.9,
        "value_clip": False,
        "key_feedback": False,
        "value_feedback": False,
        "damping": 1.0,
        "fit_tokens": 100,
    }.items():
        other = fit_layer(k, v, gk, gv, spec, replace(plain, **{name: value})).tensors()
        assert any(not torch.equal(base[field], other[field]) for field in base), name


def test_the_clip_search_finds_each_heads_own_best_range() -> None:
    """A head with short tails wants its whole range; one with a few far elements a part of it."""
    k, v, gk, gv = data()
    v[1] = v[1].sign() * (1 + 0.01 * v[1].abs())
    spec = CodecSpec(2, 2, value_slots=0, key_token_scale=True)
    quick = FitSettings(refine=0, stretch=0.0)
    found = fit_layer(k, v, gk, gv, spec, quick)
    ends = found.value_table[:, -1].tolist()
    assert ends[0] < 0.9 * table_limit(2)
    assert ends[1] == table_limit(2)
    moment = gv.transpose(1, 2) @ gv

    def losses(tables: LayerTables) -> Tensor:
        error = dequantise_values(quantise_values(v[None], tables, spec), tables, spec)[0] - v
        return (error * (error @ moment)).sum((1, 2))

    least = losses(found)
    for part in (0.6, 0.7, 0.85, 1.0):
        other = fit_layer(k, v, gk, gv, spec, replace(quick, value_range=part))
        assert bool((least <= losses(other)).all())


def test_ignored_tokens_have_no_influence() -> None:
    k, v, gk, gv = data()
    spec = CodecSpec(3, 3)
    ignore = torch.arange(TOKENS) % 50 == 0
    base = fit_layer(k, v, gk, gv, spec, ignore=ignore).tensors()
    k, v = k.clone(), v.clone()
    k[:, ignore], v[:, ignore] = 1e4, torch.nan
    other = fit_layer(k, v, gk, gv, spec, ignore=ignore).tensors()
    assert all(torch.equal(base[name], other[name]) for name in base)


def test_constant_channels_and_zero_gradients() -> None:
    k, v, gk, gv = data()
    k[:, :, 3], v[:, :, 4] = 7.0, 0.0
    spec = CodecSpec(2, 2, key_token_scale=True)
    tables = fit_layer(k, v, gk * 0, gv * 0, spec)
    keys = dequantise_keys(quantise_keys(k[None], tables, spec), tables, spec)
    assert bool(keys.isfinite().all())
    assert float((keys[0, :, :, 3] - 7).abs().max()) < 0.5  # zeros are at most 1024 steps


@pytest.mark.parametrize("bad", ["few", "nan"])
def test_unusable_calibration_is_refused(bad: str) -> None:
    k, v, gk, gv = data()
    if bad == "few":
        k, v, gk, gv = (t[:, :3] for t in (k, v, gk, gv))
    else:
        v[0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError):
        fit_layer(k, v, gk, gv, CodecSpec(3, 3))
