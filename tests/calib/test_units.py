"""Static units of values: in heads whose channels are of unlike size, and in no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvquant_compile.calib.fit_values import expected_loss, fit_values
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec.spec import CodecSpec

SPEC = CodecSpec(2, 2, 1, 0, key_token_scale=True)
BARE = FitSettings(value_transform=False)


def values(heads: int = 3) -> Tensor:
    """float32 [heads, 512, 32]; a channel of the first head is thirty times as large."""
    v = torch.randn(heads, 512, 32, generator=torch.Generator().manual_seed(0))
    v[0, :, 5] *= 30
    return v


def gradients(v: Tensor) -> Tensor:
    """What reads a large channel weighs it the less."""
    noise = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    return noise / v.std(1, keepdim=True)


@pytest.mark.parametrize("weighted", [True, False])
def test_no_head_loses_and_an_uneven_one_gains(weighted: bool) -> None:
    v = values()
    grad = gradients(v) if weighted else None
    settings = FitSettings()
    found, bare = fit_values(v, grad, SPEC, settings), fit_values(v, grad, SPEC, BARE)
    mine, without = (expected_loss(v, grad, x, SPEC) for x in (found, bare))
    assert (mine <= without).all()
    if weighted:
        assert mine[0] < 0.1 * without[0]
        assert found["value_gain"][0, 5] > 10 * found["value_gain"][0].median()


def test_a_head_for_which_they_do_not_pay_has_none() -> None:
    """One channel carries all that counts: shrinking the others' errors is no gain."""
    v = values(1)
    grad = 1e-3 * gradients(v)
    grad[:, :, 5] = 1.0
    found = fit_values(v, grad, SPEC, FitSettings())
    asked = fit_values(v, grad, SPEC, replace(FitSettings(), value_transform=True))
    chosen, both = (
        [expected_loss(v, grad, x, SPEC) for x in fits]
        for fits in ([found], [asked, fit_values(v, grad, SPEC, BARE)])
    )
    torch.testing.assert_close(chosen[0], torch.stack(both).min(0).values)
    assert torch.equal(found["value_gain"], torch.ones(1, 32))


def test_heads_are_chosen_for_one_by_one() -> None:
    v = values()
    grad = gradients(v)
    grad[1] = 1e-3 * grad[1]
    together = fit_values(v, grad, SPEC, FitSettings())
    for head in range(3):
        alone = fit_values(v[head : head + 1], grad[head : head + 1], SPEC, FitSettings())
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name][head], tensor[0])
