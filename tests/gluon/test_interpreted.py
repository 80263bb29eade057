"""The Gluon back end's launch and kernels on a CPU, against float64; see :mod:`.interpret`."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.triton.compat import unavailable
from tests.gluon.cases import BASE, DEFAULT, FEATURES, FORMATS
from tests.lowering.reference import half_rope, interleaved_rope
from tests.triton.cases import TOLERANCE, Built, Case, relative_error

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")

NARROW = replace(BASE, dims=(32, 32), rope=half_rope(32, 32))
HALF_SERIES = replace(BASE, dims=(64, 64), rope=half_rope(64, 64, 5e5))
"""Of the two groups of pairs one turns explicitly, the other by a series."""

RECENT = replace(DEFAULT, recent_tokens=16)

SMALL = {
    "3 bit, one slab": replace(HALF_SERIES, slabs=1),
    "default": replace(HALF_SERIES, spec=DEFAULT, lengths=(150, 70)),
    "one query, eight terms": replace(
        HALF_SERIES, rope=half_rope(64, 64), rep=1, heads=2, lengths=(150,), start=999_000,
        spec=DEFAULT,
    ),
    "two queries, four terms": replace(
        HALF_SERIES, rep=1, steps=2, lengths=(130,), spec=CodecSpec(2, 2, 2, 0, False, 0)
    ),
    "default, no RoPE, hidden": replace(NARROW, rope=None, spec=DEFAULT, hidden=9, lengths=(130,)),
    "1 bit, window over pages": replace(
        NARROW, spec=CodecSpec(1, 1, 0, 0, False, 0), window=70, lengths=(200, 64), rep=1
    ),
    "2/4 bit, slots, 64/32": replace(
        NARROW, spec=CodecSpec(2, 4, 2, 2, True, 2), dims=(64, 32), rope=half_rope(64, 32)
    ),
    "4/2 bit, key slot, 96/32, scattered and hidden": replace(
        NARROW, spec=CodecSpec(4, 2, 1, 0, False, 0), dims=(96, 32), rope=half_rope(96, 96),
        scattered=True, hidden=5, rep=2, lengths=(100,),
    ),
    "interleaved, scaled, far": replace(
        NARROW, rope=interleaved_rope(32), start=999_000, lengths=(100,)
    ),
    "ragged and empty": replace(NARROW, lengths=(1, 200, 0, 63), rep=1, heads=2, slabs=3),
    "soft-cap, sink logits": replace(NARROW, softcap=1.5, sink_logits=True, lengths=(70,)),
    "four steps, padding, two tiles": replace(
        NARROW, steps=4, padding=2, rep=3, lengths=(90, 70)
    ),
    "window, steps, own tokens": replace(
        NARROW, steps=3, exact=False, rep=2, window=40, lengths=(150,)
    ),
    "default, 8 columns": replace(HALF_SERIES, spec=DEFAULT, lengths=(150,), rep=6),
    "key slots, no RoPE, 8 columns": replace(
        NARROW, rope=None, spec=CodecSpec(3, 3, 1, 0, True, 0), rep=8, lengths=(130,)
    ),
    "peaked": replace(NARROW, sharpness=16.0, lengths=(150,)),
    "recent, the default": replace(
        NARROW, spec=replace(RECENT, value_slots=0), lengths=(150, 0, 7), steps=3, rep=2, hidden=0
    ),
    "recent, cropped, window, soft-cap": replace(
        HALF_SERIES, spec=replace(RECENT, sink_tokens=3), lengths=(70, 10), cropped=6, window=20,
        hidden=3, softcap=1.5, rep=1
    ),
    "recent, all cropped, no RoPE, padding": replace(
        NARROW, spec=RECENT, rope=None, cropped=16, lengths=(66,), steps=4, padding=1, rep=1
    ),
}  # fmt: skip


def check(case: Case, **how: Any) -> bytes:
    """Run a case and compare all that it leaves; its log-sum-exps, to the bit."""
    return check_built(case.build(), **how)


def check_built(built: Built, **how: Any) -> bytes:
    """The same, of a case that has been built."""
    from tests.gluon.interpret import interpret

    outcome = interpret(built, **how)
    expected, expected_lse = built.expected()
    real = (built.slots >= 0)[:, :, None, None].expand_as(expected)
    assert relative_error(outcome.output[real], expected[real]) <= built.case.tolerance
    assert (outcome.output[~real] == 0).all(), "rows of padding are zero"
    assert not outcome.counters.any(), "the next launch finds its counters at zero"
    there = torch.isfinite(expected_lse) & (built.slots >= 0)[:, None]
    if there.any():
        gap = (outcome.lse.double() - expected_lse)[there].abs().max()
        assert gap < 2.5 * TOLERANCE * max(1.0, built.case.sharpness)
    return outcome.lse.numpy().tobytes()


@pytest.mark.parametrize("name", SMALL)
def test_small_cases(name: str) -> None:
    check(SMALL[name])


@pytest.mark.parametrize(
    "name", ["default", "4/2 bit, key slot, 96/32, scattered and hidden", "ragged and empty"]
)
def test_as_on_ampere(name: str) -> None:
    check(SMALL[name], bulk=False)


@pytest.mark.parametrize("seed", range(3))
def test_a_page_of_which_a_query_sees_nothing(seed: int) -> None:
    check(replace(NARROW, steps=2, rep=2, exact=False, lengths=(127,), seed=seed))


@pytest.mark.parametrize("seed", range(3))
def test_a_page_of_hidden_tokens(seed: int) -> None:
    built = replace(NARROW, lengths=(200,), seed=seed).build()
    built.cache.positions[:, 64:128] = -1 - built.cache.positions[:, 64:128]
    check_built(built)


def test_large_scores_stay_in_fixed_point() -> None:
    """Few tokens in a page: often the largest weight has the largest scale, and fills its bytes."""
    case = replace(NARROW, rope=None, rep=8, heads=8, lengths=(2,) * 8, sharpness=64.0)
    check(replace(case, spec=CodecSpec(2, 1, 0, 0, False, 0)))


def test_residuals_of_pairs_of_tiny_scale_stay_finite() -> None:
    """Nearly dead pairs with large outliers, which are held over the pair's scale."""
    spec = CodecSpec(3, 3, 1, 0, False, 0)
    built = replace(NARROW, spec=spec, lengths=(64,)).build()
    scale = built.cache.tables[1] / 64
    tiny = torch.arange(32) % 16 < 14
    built.cache.tables[1].copy_(torch.where(tiny, scale * 1e-7, scale))
    start, end = built.layout.offsets["key_slot_residual"]
    for slab in built.cache.pages:
        residual = slab[..., start:end].contiguous().view(torch.float16) * 256
        slab[..., start:end] = residual.view(torch.uint8)
    built.query = built.query / 256
    check_built(built)


@pytest.mark.slow
@pytest.mark.parametrize("bulk", [True, False], ids=["hopper", "ampere"])
@pytest.mark.parametrize("name", FORMATS | FEATURES)
def test_every_case_of_a_gpu(name: str, bulk: bool) -> None:
    check((FORMATS | FEATURES)[name], bulk=bulk)


@pytest.mark.parametrize("order", ["own first", "own last"])
@pytest.mark.parametrize("splits", [1, 5])
def test_any_order_of_programs(order: str, splits: int) -> None:
    check(SMALL["default"], order=order, splits=splits, seed=splits)


def test_deterministic_mode_gives_the_same_bits_in_any_order() -> None:
    run = functools.partial(check, SMALL["3 bit, one slab"], deterministic=True, splits=2)
    first = run(seed=1, order="own first")
    assert all(run(seed=seed) == first for seed in (2, 3))


def test_warps_draw_other_pages_in_another_order() -> None:
    case = replace(SMALL["3 bit, one slab"], lengths=(1200,))
    results = {check(case, seed=seed) for seed in range(4)}
    assert len(results) > 1, "no order changed even a bit: are pages drawn at all?"


@pytest.mark.parametrize(
    ("bulk", "removed", "complaint"),
    [
        (True, r"bar\.warp\.sync -1;", "no barrier between"),
        (True, r"bar\.sync\s+0;", "no barrier between|no mbarrier"),
        (True, r"@!p bra AGAIN;", "has not waited for"),
        (False, r"(?<=group 1; )bar\.warp\.sync -1;", "no barrier between"),
        (False, r"(?<!group 1; )bar\.warp\.sync -1;", "no barrier between"),
        (False, r"cp\.async\.wait_group 1;", "has not waited for"),
        (False, r"cp\.async\.wait_group 2;", "has not waited for"),
        (False, r"cp\.async\.commit_group;(?! })", "has not waited for"),
    ],
)
def test_a_kernel_without_its_barriers_is_found_out(
    bulk: bool, removed: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.gluon import interpret
    from tests.gluon.ptx.decode import decode
    from tests.gluon.ptx.errors import Hazard

    def without(*which: Any) -> Any:
        text, shared_bytes = interpret.emitted(*which)
        less = re.sub(removed, "", text)
        assert less != text
        return decode(less, which[0].name), shared_bytes

    built = SMALL["default"].build()
    monkeypatch.setattr(interpret, "decoded", without)
    with pytest.raises(Hazard, match=complaint):
        interpret.interpret(built, bulk=bulk)
