"""Every recipe's codecs through the testing library, and what the papers say of their sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile import testing
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.recipes import (
    NAMED,
    Recipe,
    fp8,
    gear,
    int_per_token,
    kivi,
    qserve,
    rotatekv,
    rvq,
)

SMALL = {
    "int": int_per_token(3, 2),
    "int, groups": int_per_token(3, group=8),
    "fp8": fp8(),
    "kivi": kivi(2, 3),
    "kivi, no window": kivi(2, window=0),
    "rotatekv": rotatekv(2, 4),
    "qserve": qserve(4),
    "gear": gear(2, 3),
    "rvq": rvq(1, 2, entries=16, steps=2),
}
OURS = {"kvquant+": CodecSpec(3, 3, 1, 1, True, 1), "kvquant": CodecSpec(2, 2, 1, 1, False, 1)}
KEYS = testing.Profile(batch=2, tokens=128, offset=6.0, tail=6.0).tensor()
EVERY = pytest.mark.parametrize("recipe", SMALL.values(), ids=SMALL)


def test_every_named_recipe_is_tested() -> None:
    assert set(NAMED) <= set(SMALL)
    assert {recipe.name.split()[0] for recipe in SMALL.values()} == set(NAMED)


@pytest.mark.parametrize("codec", [*SMALL.values(), *OURS.values()], ids=[*SMALL, *OURS])
def test_stored_read_and_counted(codec: Recipe | CodecSpec) -> None:
    testing.assert_roundtrip(codec, KEYS, tolerance=0.8)
    testing.assert_deterministic(codec, KEYS)
    testing.assert_effective_bits(codec, KEYS)
    testing.assert_bytes_matter(codec, KEYS)


@EVERY
@given(x=testing.kv_tensors(multiple=64, tokens=(64, 128)))
@settings(deadline=None, max_examples=6, derandomize=True)
def test_extremes_come_back_finite(recipe: Recipe, x: torch.Tensor) -> None:
    testing.assert_roundtrip(recipe, x)


@EVERY
@given(data=st.data())
@settings(deadline=None, max_examples=4, derandomize=True)
def test_the_cache_does_not_depend_on_the_pieces(recipe: Recipe, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 200))
    x = testing.Profile(tokens=count, seed=count).tensor()
    pieces = data.draw(testing.splits(count))
    testing.assert_append_order_invariant(recipe, x, pieces, calibration=KEYS[:1])


@EVERY
def test_nonfinite_tokens_stay_among_themselves(recipe: Recipe) -> None:
    testing.assert_nonfinite_policy(recipe, KEYS, "contain")


@pytest.mark.parametrize("recipe", [int_per_token(3), kivi(2), fp8()], ids=lambda r: r.name)
def test_claimed_error_bounds_and_propagation(recipe: Recipe) -> None:
    testing.assert_error_bound(recipe, KEYS)
    testing.assert_idempotent(recipe, KEYS)
    testing.assert_nonfinite_policy(recipe, KEYS, "propagate")


@pytest.mark.parametrize(
    ("recipe", "keys", "values"),
    [
        (int_per_token(4), 4.25, 4.25),
        (fp8(), 8.0, 8.0),
        (kivi(2), 3.0, 3.0),
        (kivi(4), 5.0, 5.0),
        (kivi(2, group=64), 2.5, 2.5),
        (rotatekv(2), 2.25, 2.25),
        (qserve(4), 4.25, 4.25),
        (rvq(3), 2.875, 2.875),
        # codes, ranges, two outliers of 22 (23) bits, two rank-2 factors over 64 tokens
        (gear(2), 2 + 32 / 64 + 2 * 22 / 64 + 0.75, 2 + 32 / 64 + 2 * 23 / 128 + 0.75),
    ],
    ids=lambda r: getattr(r, "name", r),
)
def test_effective_bits_at_128_channels(recipe: Recipe, keys: float, values: float) -> None:
    assert recipe.keys.effective_bits(128) == pytest.approx(keys)
    assert recipe.values.effective_bits(128) == pytest.approx(values)


def test_more_bits_err_less() -> None:
    for name, make in NAMED.items():
        if name == "fp8":
            continue
        options = {"entries": 16, "steps": 2} if name == "rvq" else {}
        errors = [testing.streamed(make(b, **options), KEYS, [128]).keys for b in (2, 3, 4)]
        sizes = [float((e - KEYS).norm()) for e in errors]
        assert sizes == sorted(sizes, reverse=True), name


def test_kivi_keeps_the_published_tail() -> None:
    """Keys: nothing of a full window is exact, all of a partial one. Values: the last 128."""
    recipe = kivi(2)
    for count, exact_keys in ((127, 127), (128, 0), (200, 72), (256, 0)):
        x = testing.Profile(tokens=count).tensor()
        stored = testing.streamed(recipe, x, [count])
        same = (stored.keys == x).all(-1).all(1)[0]
        assert same.sum() == exact_keys
        assert same[count - exact_keys :].all()
        same = (stored.values == x).all(-1).all(1)[0]
        assert same[-128:].all()
        assert same[:-128].sum() <= 2


def test_sinks_are_exact() -> None:
    stored = testing.streamed(rotatekv(2, sinks=3), KEYS, [128])
    assert torch.equal(stored.keys[:, :, :3], KEYS[:, :, :3])
    assert not torch.equal(stored.keys[:, :, 3:4], KEYS[:, :, 3:4])


def test_the_exact_tail_is_counted() -> None:
    x = testing.Profile(tokens=128).tensor()
    window, none = (testing.streamed(kivi(2, window=w), x, [128]) for w in (128, 32))
    assert window.effective_bits > none.effective_bits > 3.0
    rows = 128 + 1  # float32 here, one row for the ring's count
    page = 64 * 2 * 32 * 3 // 8
    bookkeeping = 4 * (2 + 128 + 1)  # block table, positions, length
    expected = (2 * page * 2 + rows * 2 * 64 * 4 + bookkeeping) * 8 / (128 * 2 * 64)
    assert window.effective_bits == pytest.approx(expected, rel=0.02)
