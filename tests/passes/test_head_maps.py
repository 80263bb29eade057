"""Attention to copies of cached heads is attention to the cached heads."""

from __future__ import annotations

import pytest
import torch

from kvquant_compile.capture import ATTEND, capture
from kvquant_compile.errors import KVQuantError
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests.survey.case import build


def test_repeated_heads_are_read_where_they_are_cached():
    captured = capture(build("jetmoe"))
    layers = recognise(captured)
    for layer in layers:
        plan = layer.plan
        assert (plan.kv_heads, plan.value_dim, plan.latent) == (2, 16, 0)
        assert plan.rope is not None
    assert max(validate_lossless(captured, layers).values()) < 1e-5


def test_differential_attention_is_one_attention_to_wide_values():
    captured = capture(build("diffllama"))
    layers = recognise(captured)
    attends = captured.graph_module.graph.find_nodes(op="call_function", target=ATTEND)
    assert len(attends) == len(layers) == 2
    for layer in layers:
        plan = layer.plan
        assert (plan.kv_heads, plan.key_dim, plan.value_dim, plan.latent) == (2, 16, 32, 16)
        assert plan.rope is not None
    assert max(validate_lossless(captured, layers).values()) < 1e-5


@pytest.mark.parametrize("change", ["computed", "one head"])
def test_other_heads_are_refused(change, monkeypatch):
    original = torch.Tensor.repeat

    def repeat(self, *sizes):
        if sizes != (1, 2, 1, 1):
            return original(self, *sizes)
        if change == "computed":
            return original(self * 2, *sizes)
        return original(self[:, :1], 1, 4, 1, 1)

    monkeypatch.setattr(torch.Tensor, "repeat", repeat)
    with pytest.raises(KVQuantError, match=r"no copies|not read|differs from it|contradicts"):
        recognise(capture(build("jetmoe")))
