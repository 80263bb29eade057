"""Widths, slots and sinks that optimize takes, and what explain says about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvquant_compile
from tests.api.helpers import IDS, TEXT, logits, quantised
from tests.zoo import tiny


def test_more_bits_are_closer_and_larger(original: torch.Tensor) -> None:
    errors, sizes = [], []
    for bits in (1, 2, 3, 4, 5, 6, 7, 8):
        model = kvquant_compile.optimize(tiny("llama"), bits, calibration=TEXT)
        errors.append(float((quantised(model) - original).norm() / original.norm()))
        sizes.append(kvquant_compile.explain(model).bytes_per_token)
        layers = kvquant_compile.explain(model).layers
        assert {(x.key_bits, x.value_bits) for x in layers} == {(bits, bits)}
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert errors[0] > 0.05
    assert errors[-1] < 0.01


@pytest.mark.parametrize(
    ("bits", "widths"),
    [
        ((4, 2), [(4, 2), (4, 2)]),
        ([2, 5], [(2, 5), (2, 5)]),
        ({0: 2, 1: (4, 3)}, [(2, 2), (4, 3)]),
        ({0: 16, 1: 3}, [(16, 16), (3, 3)]),
        (16, [(16, 16), (16, 16)]),
    ],
    ids=str,
)
def test_pairs_and_widths_by_layer(
    bits: Any, widths: list[tuple[int, int]], original: torch.Tensor
) -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits, calibration=TEXT)
    layers = kvquant_compile.explain(model).layers
    assert [(x.key_bits, x.value_bits) for x in layers] == widths
    error = float((quantised(model) - original).norm() / original.norm())
    assert error < 1e-5 if bits == 16 else 1e-4 < error < 0.5


def test_slots_and_sinks_are_stored() -> None:
    plain, rich = (
        kvquant_compile.optimize(
            tiny("llama"), 2, calibration=TEXT, slots=slots, sinks=sinks, recent_window=0
        )
        for slots, sinks in ((0, 0), ((3, 2), 5))
    )
    assert [x.slots for x in kvquant_compile.explain(plain).layers] == ["0+0", "0+0"]
    assert [x.slots for x in kvquant_compile.explain(rich).layers] == ["3+2", "3+2"]
    assert [kvquant_compile.explain(m).sinks for m in (plain, rich)] == [0, 5]
    expected = logits(tiny("llama"))
    exact = (quantised(rich) - expected)[:, :5].norm() / expected[:, :5].norm()
    assert exact < 1e-5
    assert (quantised(plain) - expected)[:, 1:5].norm() / expected[:, 1:5].norm() > 1e-2


def test_attend_quantized_is_the_same_switched_by_option_or_context(
    three: PreTrainedModel,
) -> None:
    always = kvquant_compile.optimize(
        tiny("llama"), calibration=kvquant_compile.artifact(three), attend_quantized=True
    )
    assert torch.equal(logits(always), quantised(three))
    assert not torch.equal(logits(three), quantised(three))
    with torch.no_grad():
        assert torch.equal(always(IDS, use_cache=False).logits, logits(always))


def test_the_context_ends_with_its_block(three: PreTrainedModel) -> None:
    before = logits(three)
    with pytest.raises(KeyError), kvquant_compile.quantised_attention(three):
        raise KeyError
    assert torch.equal(logits(three), before)
    with (
        pytest.raises(kvquant_compile.OptionError, match="not optimised"),
        kvquant_compile.quantised_attention(tiny("llama")),
    ):
        pass


@pytest.mark.parametrize(
    "asked", [{"bits": 4}, {"slots": 1}, {"sinks": 3}, {"recent_window": 0}], ids=str
)
def test_asking_for_another_format_than_the_artifacts_is_refused(
    asked: dict[str, int], three: PreTrainedModel
) -> None:
    tables = kvquant_compile.artifact(three)
    with pytest.raises(kvquant_compile.OptionError, match="another format"):
        kvquant_compile.optimize(tiny("llama"), calibration=tables, **asked)
    model = kvquant_compile.optimize(tiny("llama"), calibration=tables)
    assert kvquant_compile.artifact(model).specs == tables.specs
    agreed = kvquant_compile.optimize(tiny("llama"), bits=3, slots=(1, 0), calibration=tables)
    assert kvquant_compile.artifact(agreed).specs == tables.specs
