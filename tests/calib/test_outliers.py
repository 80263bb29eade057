"""Values with outliers that no static unit holds are found, and named by explain."""

from __future__ import annotations

import json

import pytest
import torch

import kvquant_compile
from kvquant_compile.calib.fit import fit_layer
from kvquant_compile.calib.observe import Observed
from kvquant_compile.calib.outliers import WORTH, outlying_values
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.inspect.facts import facts
from tests.zoo import tiny, tokens

SPEC = CodecSpec(3, 3, 1, 0, key_token_scale=True)


def seen(jumping: bool, gradients: bool = True) -> Observed:
    """Two heads of 32 channels; in a third of the tokens some channel jumps, another each time."""
    draw = torch.Generator().manual_seed(0)
    k, v, gk, gv = (torch.randn(2, 300, 32, generator=draw) for _ in range(4))
    if jumping:
        token = torch.arange(0, 300, 3)
        v[:, token, torch.randint(32, (100,), generator=draw)] *= 40
    places = torch.arange(300)
    return Observed(k, v, *((gk, gv) if gradients else (None, None)), places)


@pytest.mark.parametrize("gradients", [True, False])
def test_jumps_are_found_and_ordinary_values_are_not(gradients: bool) -> None:
    layers = {0: seen(False, gradients), 3: seen(True, gradients)}
    tables = {
        i: fit_layer(x.keys, x.values, x.key_gradients, x.value_gradients, SPEC)
        for i, x in layers.items()
    }
    found = outlying_values(dict.fromkeys(layers, SPEC), tables, layers)
    assert found.keys() == {"3"}
    assert WORTH < found["3"] < 1
    assert json.loads(json.dumps(found)) == found


def test_who_has_a_slot_is_not_told() -> None:
    spec = CodecSpec(3, 3, 1, 1, key_token_scale=True)
    x = seen(True)
    tables = fit_layer(x.keys, x.values, x.key_gradients, x.value_gradients, spec)
    assert outlying_values({0: spec}, {0: tables}, {0: x}) == {}


def test_explain_names_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvquant_compile.calib.outliers.WORTH", 0.1)
    for bits in (3, 2.5):
        model = kvquant_compile.optimize(
            tiny("llama"), bits, calibration=tokens(4, 64), allocation="fisher"
        )
        (said,) = (x.text for x in facts(kvquant_compile.explain(model)) if x.name == "outliers")
        assert said.startswith("an exact slot would take ")
        assert said.endswith("in layers 0, 1: slots=1 has one")
    model = kvquant_compile.optimize(tiny("llama"), 3, calibration=tokens(4, 64), slots=1)
    assert "outliers" not in {x.name for x in facts(kvquant_compile.explain(model))}
