"""Recipes on a GPU give what they give on a CPU: the reference op, on the device's own tensors."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import kvquant_compile
from kvquant_compile import testing
from kvquant_compile.recipes import Recipe, fp8, gear, int_per_token, kivi, qserve, rotatekv, rvq
from tests.zoo import tiny, tokens

pytestmark = pytest.mark.gpu
TEXT = list(tokens(4, 96, seed=7).split(1))
IDS = tokens(2, 150, seed=3)
RECIPES: dict[str, Any] = {
    "int": (int_per_token, 4),
    "fp8": (fp8, None),
    "kivi": (functools.partial(kivi, window=32), 4),
    "rotatekv": (rotatekv, 4),
    "qserve": (qserve, 4),
    "gear": (gear, 4),
    "rvq": (functools.partial(rvq, entries=16, steps=2), 4),
}
EVERY = pytest.mark.parametrize("name", RECIPES)


def logits(model: Any, device: str) -> torch.Tensor:
    cache = kvquant_compile.new_cache(model)
    with torch.no_grad(), kvquant_compile.quantised_attention(model):
        for piece in IDS.to(device).split([100, 49, 1], 1):
            out = model(piece, past_key_values=cache).logits
    return out.float().cpu()


@EVERY
def test_the_logits_are_the_cpus(name: str) -> None:
    recipe, bits = RECIPES[name]
    model = kvquant_compile.optimize(tiny("llama"), bits, recipe=recipe, calibration=TEXT)
    given, expected = kvquant_compile.artifact(model), logits(model, "cpu")
    moved = kvquant_compile.optimize(tiny("llama").to("cuda"), calibration=given)
    error = (logits(moved, "cuda") - expected).norm() / expected.norm()
    assert error < 0.05  # codes at a boundary may differ
    assert {x.implementation for x in kvquant_compile.explain(moved).layers} == {"reference op"}
    out = moved.generate(IDS.to("cuda"), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 155)


@EVERY
def test_calibration_on_the_gpu(name: str) -> None:
    recipe, bits = RECIPES[name]
    model = tiny("llama").to("cuda", torch.bfloat16)
    kvquant_compile.optimize(model, bits, recipe=recipe, calibration=TEXT)
    assert torch.isfinite(logits(model, "cuda")).all()


@EVERY
def test_codecs_keep_their_promises_on_the_gpu(name: str) -> None:
    recipe, bits = RECIPES[name]
    made: Recipe = recipe() if bits is None else recipe(bits)
    x = testing.Profile(batch=2, tokens=128).tensor().cuda()
    testing.assert_roundtrip(made, x, tolerance=0.6)
    testing.assert_append_order_invariant(made, x)
    testing.assert_effective_bits(made, x)
    testing.assert_bytes_matter(made, x)
