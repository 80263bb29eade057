"""Latent attention: what is attended is what is cached."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from kvquant_compile.capture import ATTEND, capture
from kvquant_compile.errors import KVQuantError
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests.survey.case import build


@pytest.mark.parametrize(
    ("model_type", "pairing"),
    [("deepseek_v3", "interleaved->half"), ("minicpm3", "half"), ("kimi_linear", None)],
)
def test_latents_are_stored_before_rope(model_type, pairing):
    captured = capture(build(model_type))
    layers = recognise(captured)
    for layer in layers:
        plan = layer.plan
        assert (plan.kv_heads, plan.key_dim, plan.value_dim, plan.latent) == (1, 40, 32, 32)
        assert (plan.rope.pairing if plan.rope else None) == pairing
        if plan.rope:
            assert plan.rope.passthrough == tuple((i, i) for i in range(32))
    assert max(validate_lossless(captured, layers).values()) < 1e-5


def test_the_matrices_are_the_models_own():
    model = build("deepseek_v3")
    captured = capture(model)
    recognise(captured)
    attention = model.model.layers[1].self_attn
    weight = attention.kv_b_proj.weight.view(4, 32, 32)  # heads, (key, value), latent
    buffers = {name: t for name, t in captured.graph_module.named_buffers() if "absorbed_1" in name}
    assert torch.equal(buffers["kvquant_absorbed_1_key"], weight[:, :16])
    assert torch.equal(buffers["kvquant_absorbed_1_value"], weight[:, 16:].transpose(1, 2))
    attends = captured.graph_module.graph.find_nodes(op="call_function", target=ATTEND)
    assert [node.args[6] for node in attends] == [attention.scaling] * 2


@pytest.mark.parametrize("change", ["tanh", "shift", "heads"])
def test_other_expansions_are_refused(change, monkeypatch):
    original = DeepseekV3Attention.expand_kv

    def expand(self, latent, rotated):
        key, value = original(self, latent, rotated)
        if change == "tanh":
            return key.tanh(), value
        if change == "shift":  # a token's value is its predecessor's
            return key, value.roll(1, 2)
        scale = torch.arange(1.0, 5.0)[:, None, None]  # the rotated part differs by head
        return key * scale, value

    monkeypatch.setattr(DeepseekV3Attention, "expand_kv", expand)
    with pytest.raises(KVQuantError, match=r"cached ones|differs from it|contradicts"):
        recognise(capture(build("deepseek_v3")))


def test_nothing_changes_where_keys_are_attended_as_cached():
    captured = capture(build("llama"))
    before = [node.name for node in captured.graph_module.graph.nodes]
    recognise(captured)
    assert [node.name for node in captured.graph_module.graph.nodes] == before
