"""The compiled attention against float64 over the same pages, and against the torch op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.attend import attend as torch_attend
from kvquant_compile.lowering.cpp.build import toolchain_failure
from kvquant_compile.lowering.cpp.launch import attend
from tests.lowering.reference import half_rope
from tests.triton.cases import Case, relative_error
from tests.triton.run_cases import FEATURES, FORMATS

pytestmark = pytest.mark.skipif(bool(toolchain_failure()), reason=toolchain_failure() or "never")
TOLERANCE = 4e-5
"""Weights of values are whole numbers of 16 bits where the machine multiplies bytes."""

EXACT = 2e-6
ONE_OF_EACH = replace(FORMATS["k2v4 one of each"], heads=2, rep=3)


def check(case: Case, *, native: bool = True) -> None:
    built = case.build()
    output, lse = attend(*built.arguments(), native=native)
    expected, expected_lse = built.expected()
    real = (built.slots >= 0)[:, :, None, None].expand_as(expected)
    rounding = torch.finfo(case.dtype).eps if case.dtype != torch.float32 else 0
    tolerance = (TOLERANCE if native else EXACT) + rounding
    assert relative_error(output[real], expected[real]) <= tolerance
    assert (output[~real] == 0).all()
    there = torch.isfinite(expected_lse) & (built.slots >= 0)[:, None]
    gap = (lse.double() - expected_lse)[there].abs()
    assert gap.numel() == 0 or gap.max() <= 2e-5 * max(1.0, case.sharpness)
    assert (lse[~there] == -torch.inf).all()


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    check(FORMATS[name])


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    case = FEATURES[name]
    recent = case.spec.recent_tokens
    spec = replace(ONE_OF_EACH.spec, recent_tokens=recent) if recent else ONE_OF_EACH.spec
    check(replace(case, spec=spec))


@pytest.mark.parametrize("case", [FORMATS["none"], ONE_OF_EACH], ids=["none", "one of each"])
def test_without_this_machines_instructions(case: Case) -> None:
    check(case, native=False)


@settings(max_examples=60, deadline=None)
@given(
    rep=st.integers(1, 9),
    steps=st.integers(1, 16),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    window=st.sampled_from([0, 0, 1, 9, 70]),
    softcap=st.sampled_from([0.0, 0.0, 2.0]),
    exact=st.booleans(),
    start=st.sampled_from([0, 5000, 2**30]),
    hidden=st.integers(0, 9),
    scattered=st.booleans(),
    sink_logits=st.booleans(),
    recent=st.sampled_from([0, 0, 16, 32]),
    cropped=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_step(
    lengths: list[int], hidden: int, recent: int, exact: bool, **options: object
) -> None:
    lengths = [max(n, 1) for n in lengths] if hidden else lengths
    options |= {"hidden": hidden, "exact": exact or recent > 0}
    spec = replace(ONE_OF_EACH.spec, recent_tokens=recent)
    case = replace(ONE_OF_EACH, spec=spec, lengths=tuple(lengths), **options)  # type: ignore[arg-type]
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_the_torch_op(dtype: torch.dtype) -> None:
    built = replace(ONE_OF_EACH, dtype=dtype, lengths=(300, 64)).build()
    found, expected = attend(*built.arguments()), torch_attend(*built.arguments())
    torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_strided_inputs_and_an_odd_head_count() -> None:
    case = replace(ONE_OF_EACH, heads=3, rep=1, steps=2, lengths=(130,))
    built = case.build()
    query, key, value, *rest = built.arguments()
    wide = [torch.cat([x, x], 2)[:, :, : x.shape[2]] for x in (query, key, value)]
    assert not wide[0].is_contiguous()
    assert torch.equal(attend(*wide, *rest)[0], attend(query, key, value, *rest)[0])


def test_threads_share_the_work() -> None:
    built = replace(ONE_OF_EACH, lengths=(3000, 1000)).build()
    before = torch.get_num_threads()
    alone = attend(*built.arguments())
    try:
        torch.set_num_threads(3)
        together = attend(*built.arguments())
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("section", "number"),
    [
        ("key_slot_residual", torch.nan),  # an infinite key may score minus infinity
        ("value_scale_zero", torch.nan),
        ("value_scale_zero", torch.inf),
        ("value_slot_residual", torch.nan),
        ("value_slot_residual", -torch.inf),
    ],
)
def test_numbers_that_are_not_finite_propagate(section: str, number: float) -> None:
    built = replace(ONE_OF_EACH, heads=1, rep=2, lengths=(130,)).build()
    start, end = built.layout.offsets[section]
    page = built.cache.pages[0][0, 0]
    page[start:end].view(torch.float16)[5] = number
    found, expected = attend(*built.arguments())[0], torch_attend(*built.arguments())[0]
    assert not expected.isfinite().all(), "the case says nothing"
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_what_lies_behind_the_last_token_counts_for_nothing() -> None:
    built = replace(ONE_OF_EACH, lengths=(70,), heads=1, slabs=1).build()
    expected = attend(*built.arguments())
    last = built.cache.pages[0][int(built.cache.table[0, 1])]
    for section, size in (("value_scale_zero", 4), ("value_slot_residual", 2)):
        start, end = built.layout.offsets[section]
        last[:, start + size * 6 : end] = 255  # NaN, all of them
    found = attend(*built.arguments())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_head_of_256_channels() -> None:
    check(Case(CodecSpec(3, 3, 1, 1, True, 1), (256, 256), half_rope(256, 256), lengths=(130,)))
