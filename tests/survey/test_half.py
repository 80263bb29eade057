"""Models loaded in half precision are recognised as in single precision."""

from __future__ import annotations

import pytest
import torch

from kvquant_compile.capture.rounding import rounding_floor, widened_limit
from tests.survey.half import SAME, compare_half

# A cast after the rotation; a factor per token; experts chosen by close scores; scores in float32
# over a half-precision cache; biases too coarse to be read in half precision.
QUICK = ("cohere", "llama4_text")
MORE = ("bloom", "dbrx", "deepseek_v3", "gemma2", "gptj", "granitemoe_swa", "ministral3")


@pytest.mark.parametrize("model_type", QUICK)
def test_quick_types_have_the_same_plans(model_type):
    assert compare_half(model_type, ["bfloat16"]) == {"bfloat16": SAME}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MORE)
def test_types_have_the_same_plans_in_both_dtypes(model_type):
    assert compare_half(model_type) == {"bfloat16": SAME, "float16": SAME}


def _model(weight, jump=False):
    """Embedded tokens to one step's outputs; with a jump, a rounding changes everything."""

    def run(disturb):
        x = disturb(torch.full((8, 16), 1.0, dtype=torch.bfloat16))
        return [torch.where(x > 1, -1.0, 1.0) if jump else x.float() * weight]

    return run


def test_the_floor_is_what_one_rounding_makes():
    assert 0 < rounding_floor(_model(3.0)) < 2**-6
    assert rounding_floor(_model(1.0, jump=True)) > 0.5


def test_a_limit_is_only_raised_in_half_precision_and_within_reason():
    jump = _model(1.0, jump=True)
    assert widened_limit(0.06, 0.2, torch.bfloat16, jump) == 0.5
    assert widened_limit(0.06, 0.2, torch.float32, jump) == 0.06
    assert widened_limit(0.06, 0.7, torch.bfloat16, jump) == 0.06
    assert widened_limit(0.06, 0.2, torch.bfloat16, _model(1.0)) == 0.06
