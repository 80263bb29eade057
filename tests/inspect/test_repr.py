"""What plans, tables, caches and the rest look like in a session: short, and with the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvquant_compile
from kvquant_compile.runtime.installed import installed
from tests.zoo import tiny, tokens, unproved

TEXT = tokens(4, 64, seed=7)


@pytest.fixture(scope="module")
def model() -> Any:
    return kvquant_compile.optimize(tiny("gpt_neox"), {0: 3, 1: (4, 2)}, calibration=TEXT)


def test_reprs_are_one_short_line_each(model: Any) -> None:
    state = installed(model)
    plan = state.layers[1].plan
    with torch.no_grad():
        cache = model(tokens(2, 12)).past_key_values
    wanted = {
        "RopeSpec(half, 4/16 channels)": plan.rope,
        "LayerPlan(1: 4 query heads, 4 kv heads x 16/16, RopeSpec(half, 4/16 channels))": plan,
        "MatchedLayer(LayerPlan(1: ": state.layers[1],
        "Captured(GPTNeoXForCausalLM, transformers, ": state.captured,
        "Program(2 layers k3v3/k4v2, ": state.program,
        "Artifact(kvquant+, 2 layers, ": state.artifact,
        "LayerTables(4 heads x 16/16, 16/4 levels, ": state.artifact.tables[1],
        "Installed(Program(2 layers": state,
        "QuantizedCache(2 layers k3v3/k4v2, batch 2, 12 tokens, ": cache,
        "QuantizedLayer(k4v2 slots1/0 scale1 sink1 heads4 dim16/16 raw4 recent16, 1 slabs, ": (
            cache.layers[1]
        ),
    }
    for start, value in wanted.items():
        text = repr(value)
        assert text.startswith(start), text
        assert len(text) < 200
        assert "\n" not in text
        assert "tensor(" not in text


def test_a_refusal_is_in_the_plan_s_line() -> None:
    with pytest.warns(UserWarning, match="before RoPE"):
        model = kvquant_compile.optimize(unproved(), 16, strict=False)
    assert "refused: what happens between" in repr(installed(model).layers[0].plan)


def test_recipes_and_observations() -> None:
    from kvquant_compile.calib.observe import Observed
    from kvquant_compile.codec.algebra.recipe import RecipeTables

    x = torch.zeros(2, 5, 8)
    seen = Observed(x, x[..., :4], None, None, torch.arange(5))
    assert repr(seen) == "Observed(5 tokens, 2 heads x 8/4, no gradients)"
    assert repr(RecipeTables(("key_table",), (x,))) == "RecipeTables(key_table (2, 5, 8))"


def test_a_report_shows_itself(model: Any) -> None:
    report = kvquant_compile.explain(model)
    assert repr(report) == str(report)
