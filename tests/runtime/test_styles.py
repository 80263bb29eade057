"""Spellings of hand-written decoders: lossless equality over a conversation, and three bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kvquant_compile
from tests import style_decoders, zoo

IDS = zoo.tokens(2, 60, seed=6)
ROPE = {"LearnedDecoder": "none", "BiasDecoder": "none", "GroupedDecoder": "half 8/16",
        "ProductsDecoder": "half 16"}  # fmt: skip
EACH = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n != "GroupedDecoder" else n for n in ROPE]
)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return zoo.randomise(getattr(style_decoders, name)()).eval()


def talk(model: nn.Module) -> Tensor:
    parts, past, done = [], None, 0
    with torch.no_grad():
        for count in (40, 1, 1, 3, 15):
            logits, past = model(IDS[:, done : done + count], past)
            parts.append(logits)
            done += count
    return torch.cat(parts, 1)


@EACH
def test_lossless_equals_the_original(name: str) -> None:
    model = kvquant_compile.optimize(make(name), bits=16, example_inputs=(zoo.tokens(), None))
    assert {layer.rope for layer in kvquant_compile.explain(model).layers} == {ROPE[name]}
    torch.testing.assert_close(talk(model), talk(make(name)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROPE)
def test_three_bits_are_close_and_not_equal(name: str) -> None:
    model = kvquant_compile.optimize(
        make(name), bits=3, windows=2, example_inputs=(zoo.tokens(), None)
    )
    expected = talk(make(name))
    with kvquant_compile.quantised_attention(model):
        error = float((talk(model) - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.3
