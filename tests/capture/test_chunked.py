"""Chunked attention: a query sees its own chunk only."""

from __future__ import annotations

import pytest
import torch

from kvquant_compile.capture import capture
from kvquant_compile.capture.mask_kind import MaskKind, mask_kind
from kvquant_compile.capture.reference import exact_mask
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests.survey.case import build


@pytest.mark.parametrize("chunk", [1, 8, 96, 8192])
def test_chunks_are_recognised(chunk):
    kind = mask_kind(lambda query, key: (key <= query) & (query // chunk == key // chunk))
    # Chunks of one token are a window of one.
    assert kind == (MaskKind("chunked", chunk) if chunk > 1 else MaskKind("sliding", 1))


@pytest.mark.parametrize("edge", [5, 900])
def test_uneven_chunks_are_not(edge):
    def visible(query, key):
        return (key <= query) & ((query + edge) // 1000 == (key + edge) // 1000)

    assert not mask_kind(visible).understood


def test_chunks_are_counted_from_the_first_real_token():
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    seen = exact_mask(padding, 2, 3, 5, 4, torch.device("cpu"), chunked=True)[:, 0]
    assert seen[0].int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [0] * 6 + [1, 0], [0] * 6 + [1, 1]]
    assert seen[1].int().tolist() == [[0] * 4 + [1, 1, 0, 0], [0] * 4 + [1] * 3 + [0],
                                      [0] * 4 + [1] * 4]  # fmt: skip


def test_llama4_is_rewritten_with_its_chunks():
    captured = capture(build("llama4_text"))
    layers = recognise(captured)
    plans = [plan for layer in layers for plan in layer.plan.attends]
    assert [(plan.chunk, plan.window) for plan in plans] == [(8, 0), (0, 0)]
    assert layers[0].plan.rope is not None  # keys are normalised behind it; moved before it
    assert max(validate_lossless(captured, layers).values()) < 1e-5
