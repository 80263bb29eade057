from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvquant_compile.capture import ATTEND, MASK, capture, run_marked
from kvquant_compile.capture.hf_hooks import attention_by
from tests import zoo

MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "cohere", "phi3", "gpt2",
          "gpt_oss")  # fmt: skip


def _hidden(captured, batch: int, tokens: int) -> torch.Tensor:
    width = captured.backbone.get_input_embeddings().weight.shape[-1]
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("model_type", MODELS)
def test_graph_equals_model_over_a_left_padded_conversation(model_type):
    captured = zoo.captured(model_type)
    backbone = captured.backbone
    hidden = _hidden(captured, 3, 24)
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[0, :4], mask[1, :1] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    store, past = {}, 0
    cache = DynamicCache(config=backbone.config)
    for tokens in (13, 1, 1, 9):
        now = slice(past, past + tokens)
        inputs = hidden[:, now], mask[:, : past + tokens], positions[:, now]
        with torch.no_grad(), attention_by(backbone, captured.evidence["reference"]):
            got = run_marked(captured.graph_module, store, *inputs, past)
            expected = backbone(
                inputs_embeds=inputs[0], attention_mask=inputs[1], position_ids=inputs[2],
                past_key_values=cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
        real = mask[:, now].bool()
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)
        past += tokens


@pytest.mark.parametrize("model_type", MODELS)
def test_parameters_are_the_models_own_and_placeholders_are_as_documented(model_type):
    captured = zoo.captured(model_type)
    own = {id(p) for p in captured.model.parameters()}
    assert {id(p) for p in captured.graph_module.parameters()} <= own
    names = [n.target for n in captured.graph_module.graph.find_nodes(op="placeholder")]
    assert names == ["hidden", "attention_mask", "position_ids", "past"]
    assert captured.mask_optional


def test_capture_leaves_the_model_as_it_was():
    model = zoo.tiny("gemma2")
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    implementation = model.config._attn_implementation
    forwards = {name for name, _ in model.named_modules()}
    capture(model)
    assert [m.training for m in model.modules()] == before
    assert model.config._attn_implementation == implementation
    assert {name for name, _ in model.named_modules()} == forwards
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_autograd_runs_through_the_captured_graph():
    captured = zoo.captured("llama")
    hidden = _hidden(captured, 2, 9)
    positions = torch.arange(9).repeat(2, 1)
    parameters = [p for p in captured.backbone.parameters() if p.ndim > 1][1:]
    got = captured.graph_module(hidden, None, positions, 0)
    expected = captured.backbone(inputs_embeds=hidden, position_ids=positions).last_hidden_state
    weight = torch.randn_like(got)
    ours = torch.autograd.grad((got * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_in_place_weight_updates_are_seen():
    model = zoo.tiny("llama", seed=3)
    captured = capture(model)
    hidden, positions = _hidden(captured, 1, 4), torch.arange(4)[None]
    with torch.no_grad():
        before = captured.graph_module(hidden, None, positions, 0)
        model.model.layers[1].self_attn.v_proj.weight.mul_(2)
        after = captured.graph_module(hidden, None, positions, 0)
        expected = model.model(inputs_embeds=hidden).last_hidden_state
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_windows_and_softcaps_are_in_the_markers():
    graph = zoo.captured("gemma2").graph_module.graph
    attends = graph.find_nodes(op="call_function", target=ATTEND)
    masks = [node.args[3].args[4:6] for node in attends]
    assert masks == [("sliding", 8), ("causal", 0)]
    assert [node.args[7] for node in attends] == [5.0, 5.0]
    assert len(graph.find_nodes(op="call_function", target=MASK)) == 2


def test_half_precision_is_captured():
    captured = capture(zoo.tiny("llama").to(torch.bfloat16))
    assert captured.dtype is torch.bfloat16
    assert captured.evidence["relative_error"] < 0.02


def test_a_base_model_without_a_head_is_captured():
    model = zoo.tiny("qwen2").model
    assert capture(model).backbone is model
