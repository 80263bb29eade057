"""A head's constants, read back word by word as the kernel does, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.gluon.constants import (
    GluonConstants,
    gluon_constants,
    series_terms,
)
from kvquant_compile.lowering.gluon.launch import gluon_spec
from kvquant_compile.lowering.gluon.memory import Constants
from kvquant_compile.lowering.gluon.slots import HEADROOM
from kvquant_compile.lowering.gluon.visibility import TOKENS
from kvquant_compile.lowering.series import series_coefficients
from kvquant_compile.lowering.triton.spec import table_bias
from kvquant_compile.lowering.turns import SMALL
from tests.lowering.reference import half_rope
from tests.triton.cases import Built, Case

CODEC = CodecSpec(3, 4, 1, 1, True, 1)


def made(
    codec: CodecSpec = CODEC, base: float = 5e5, columns: int = 4
) -> tuple[Built, GluonConstants, Constants]:
    """Constants of two heads of 64 channels: one group of pairs turns explicitly, one does not."""
    built = Case(codec, (64, 64), half_rope(64, 64, base)).build()
    constants = gluon_constants(built.layout, built.cache.tables, built.cache.geometry, columns)
    spec = gluon_spec(built.layout, constants, built.site, columns, bulk=True)
    assert constants.explicit == 1
    assert spec.neighbours == (columns <= 4)
    return built, constants, Constants(spec)


def block(constants: GluonConstants, start: int, end: int) -> NDArray[np.uint8]:
    """Bytes of every head's section."""
    return constants.block.numpy().view(np.uint8)[:, start:end].copy()


def halves(constants: GluonConstants, start: int, end: int, *shape: int) -> NDArray[np.float64]:
    """A section as float16 [heads, *shape]."""
    found = block(constants, start, end).view(np.float16).astype(np.float64)
    return found.reshape(found.shape[0], *shape)


def places(rows: int) -> list[tuple[int, int, int, int, int, int, int, int]]:
    """(chunk, tile, lane, half, r, low, token offset, pair) of a group's fragment words."""
    return [
        (chunk, tile, lane, half, r, low,
         32 * chunk + 4 * (lane // 4) + 2 * tile + r - 32, 8 * half + 2 * (lane % 4) + low)
        for chunk in range(2) for tile in range(2) for lane in range(32)
        for half in range(2) for r in range(rows) for low in range(2)
    ]  # fmt: skip


def channels(built: Built, constants: GluonConstants, pair: int) -> list[NDArray[np.float64]]:
    """(scale over the head's unit, zero) of both members of a pair, two heads each."""
    scale, zero = (built.cache.tables[i].double() for i in (1, 2))
    scale = scale / constants.key_unit[:, None]
    return [x[:, pair + 32 * member].numpy() for member in range(2) for x in (scale, zero)]


@pytest.mark.parametrize("terms", [4, 8])
def test_polynomials_of_lanes(terms: int) -> None:
    _, constants, c = made(CodecSpec(3, 3, 0, 0, True, 0), columns=8 // terms)
    found = block(constants, c.polynomials, c.outliers).view(np.float32)
    found = found.reshape(2, terms // 2, 8, 8, 2)
    for lane, g, token, parity in np.ndindex(terms // 2, 8, 8, 2):
        offset = (4 * g + TOKENS[token] - 32) / 32
        expected = math.cos((2 * lane + parity) * math.acos(offset))
        np.testing.assert_allclose(found[:, lane, g, token, parity], expected, atol=1e-6)


def test_terms_of_a_query() -> None:
    assert [series_terms(columns) for columns in (1, 2, 3, 8, 64)] == [8, 4, 2, 2, 2]


def test_angles_of_offsets() -> None:
    """Where every token has a rotation of its own: eight columns of queries."""
    built, constants, c = made(columns=8)
    found = halves(constants, c.rotation, c.zeros, 2, 2, 2, 32, 2, 2, 2)
    frequencies = built.cache.geometry[2].double()
    for chunk, tile, lane, half, r, low, offset, pair in places(2):
        angle = offset * float(frequencies[pair])
        cos, sin = found[:, chunk, tile, :, lane, half, r, low].T
        np.testing.assert_allclose(cos, math.cos(angle), atol=5e-4)
        np.testing.assert_allclose(sin, math.sin(angle), atol=5e-4)


@pytest.mark.parametrize("scaled", [False, True])
def test_bytes_of_neighbours_become_turned_keys(scaled: bool) -> None:
    """``p = u A cos - v B sin + C`` and ``q = u A sin + v B cos + D``, over the pair's scale; bytes
    that mean zero to a tenth of their step."""
    built, constants, c = made(CodecSpec(3, 3, 0, 0, scaled, 0))
    found = halves(constants, c.rotation, c.zeros, 2, 2, 3, 32, 2, 2, 2)
    frequencies, bias = built.cache.geometry[2].double(), table_bias(3)
    for chunk, tile, lane, half, _, low, offset, pair in places(1):
        angle = offset * float(frequencies[pair])
        cos, sin = math.cos(angle), math.sin(angle)
        scale_a, zero_a, scale_b, zero_b = channels(built, constants, pair)
        over = np.exp2(np.ceil(np.log2(np.maximum(scale_a, scale_b))))
        (same_a, cross_b), (cross_a, same_b), (first, second) = (
            [found[:, chunk, tile, vector, lane, i, half, low] for i in range(2)]
            for vector in range(3)
        )
        for u, v, tolerance in ((bias, bias, 0.1), (0, bias, 0.3), (bias, 255, 0.3), (7, 200, 0.3)):
            a = scale_a * (u - bias + (0 if scaled else zero_a)) / over
            b = scale_b * (v - bias + (0 if scaled else zero_b)) / over
            p = (u * same_a + v * cross_b) * 2.0**-24 + first
            q = (u * cross_a + v * same_b) * 2.0**-24 + second
            np.testing.assert_allclose(p / SMALL, a * cos - b * sin, atol=tolerance)
            np.testing.assert_allclose(q / SMALL, a * sin + b * cos, atol=tolerance)


@pytest.mark.parametrize("columns", [4, 8])
def test_turned_zeros(columns: int) -> None:
    built, constants, c = made(columns=columns)
    rows = 1 if columns == 4 else 2
    # of a lane: (half, row), or (half, tile)
    if rows == 1:
        found = halves(constants, c.zeros, c.turns, 2, 2, 32, 2, 2, 2)
        found = found.transpose(0, 1, 5, 2, 3, 4, 6)[..., None, :]
    else:
        found = halves(constants, c.zeros, c.turns, 2, 2, 2, 32, 2, 2, 2)
    frequencies = built.cache.geometry[2].double()
    for chunk, tile, lane, half, r, low, offset, pair in places(rows):
        angle = offset * float(frequencies[pair])
        scale_a, zero_a, scale_b, zero_b = channels(built, constants, pair)
        over = np.exp2(np.ceil(np.log2(np.maximum(scale_a, scale_b)))) if rows == 1 else 1.0
        a, b = scale_a * zero_a / over, scale_b * zero_b / over
        turned = (a * math.cos(angle) - b * math.sin(angle),
                  a * math.sin(angle) + b * math.cos(angle))  # fmt: skip
        for member in range(2):
            got = found[:, chunk, tile, member, lane, half, r, low] / SMALL
            np.testing.assert_allclose(got, turned[member], atol=0.1)  # of 85, in half precision


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_columns_of_explicit_pairs(columns: int) -> None:
    """The query, and the query a token back, times the pair's scale; others have their series."""
    built, constants, _ = made(columns=columns)
    frequencies = built.cache.geometry[2].double()
    found = constants.coefficients.double()
    for pair in range(16):
        scale_a, _, scale_b, _ = channels(built, constants, pair)
        size = np.exp2(np.ceil(np.log2(np.maximum(scale_a, scale_b)))) / SMALL
        angle = float(frequencies[pair])
        expected = np.zeros((2, 8, 2))
        expected[:, 0, 0] = size
        expected[:, 1] = np.stack([size * math.cos(angle), size * math.sin(angle)], -1)
        np.testing.assert_allclose(found[:, pair], expected, rtol=1e-6, atol=1e-6)
    terms = series_coefficients(frequencies)[16:]
    assert torch.allclose(found[:, 16:].sum(-1), terms, atol=1e-7)
    assert not found[:, 16:, ::2, 1].any(), "even terms multiply the member itself"
    assert not found[:, 16:, 1::2, 0].any(), "odd ones the pair's other"


@pytest.mark.parametrize("scaled", [False, True])
def test_scales_make_keys_of_bytes(scaled: bool) -> None:
    """Explicit pairs of eight columns: ``byte 2**-24 scale + centre``; others: scales and zeros
    apart, with what bytes read as 1024 + byte are too large by, or that in rows of its own."""
    built, constants, c = made(CodecSpec(3, 3, 0, 0, scaled, 0), columns=8)
    found = halves(constants, c.scales, c.tables, 2, 3, 4, 4, 2)
    scale, zero = (built.cache.tables[i].double().numpy() for i in (1, 2))
    scale = scale / constants.key_unit.double().numpy()[:, None]
    bias = table_bias(3)
    for member, t, half, low in np.ndindex(2, 4, 2, 2):
        channel = 32 * member + 8 * half + 2 * t + low
        s, z = scale[:, channel], 0 if scaled else zero[:, channel]
        for byte in (0, 60):
            key = found[:, 0, member, t, half, low] * byte * 2.0**-24
            key += found[:, 0, member, t, 2 + half, low]
            expected = s * (byte - bias + z) * SMALL
            np.testing.assert_allclose(key, expected, rtol=2e-3, atol=2e-3 * s.max() * 60 * SMALL)
        other = channel + 16  # the same place of the second group
        s, excess = scale[:, other], np.full(2, -1024.0 - bias)
        rows = (excess, zero[:, other]) if scaled else (excess + zero[:, other],) * 2
        np.testing.assert_allclose(found[:, 1, 0, t, 2 * member + half, low], s, rtol=1e-3)
        for r, row in enumerate(rows):
            np.testing.assert_array_equal(found[:, 1, 1 + member, t, 2 * half + r, low], row)


def test_tables_have_their_bias() -> None:
    built, constants, c = made()
    keys = block(constants, c.tables, c.tables + 64).reshape(2, 4, 16)
    values = block(constants, c.tables + 64, c.polynomials).reshape(2, 4, 16)
    key_table, value_table = (built.cache.tables[i].numpy().astype(int) for i in (0, 4))
    for copy in range(4):
        assert (keys[:, copy, :8] == key_table + table_bias(3)).all()
        assert (values[:, copy] == value_table + table_bias(4)).all()
    _, constants, c = made(CodecSpec(3, 3, 0, 0, False, 0))
    signed = block(constants, c.tables + 64, c.polynomials).view(np.int8).reshape(2, 4, 16)
    assert (signed[:, :, :8] < 0).any(), "values of up to three bits are signed bytes"


@pytest.mark.parametrize("position", [1, -31, 4096, 999_999, 2**31 - 1])
def test_fractions_of_a_turn_are_exact_at_any_position(position: int) -> None:
    """The kernel's integer arithmetic; angles differ from float64's by its own rounding."""
    built, constants, _ = made()
    for f, (high, low) in zip(
        built.cache.geometry[2].tolist(), constants.turns.tolist(), strict=True
    ):
        turns = (((position * low) >> 32) + position * high) % 2**32 / 2**32
        expected = position * f / math.tau
        assert abs((turns - expected + 0.5) % 1.0 - 0.5) < 2e-9 + abs(expected) * 4e-16


@pytest.mark.parametrize("columns", [1, 2, 4, 8])
def test_outliers_by_channel(columns: int) -> None:
    built, constants, c = made(columns=columns)
    words = block(constants, c.outliers, c.size).view(np.int32).reshape(2, 64, 4)
    assert (words[:, :32, :2] == constants.turns.numpy()).all()
    assert (words[:, 32:, :2] == constants.turns.numpy()).all()
    assert (words[:, :32, 2] == 0).all()
    assert (words[:, 32:, 2] == 1 << 30).all(), "member b is a quarter of a turn ahead"
    factor = words[:, :, 3].copy().view(np.float32) * constants.key_unit.numpy()[:, None]
    for pair in range(16):  # explicit ones, in the units of their queries
        scale_a, _, scale_b, _ = channels(built, constants, pair)
        held = np.exp2(np.ceil(np.log2(np.maximum(scale_a, scale_b)))) if columns <= 4 else 1.0
        for member in range(2):
            np.testing.assert_allclose(factor[:, pair + 32 * member], SMALL / HEADROOM / held)
    series = np.arange(64) % 32 >= 16
    np.testing.assert_allclose(factor[:, series], 1 / HEADROOM, rtol=7e-4)  # over J0
