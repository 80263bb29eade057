from __future__ import annotations

import json

import pytest
import torch

from kvquant_compile.capture import capture
from kvquant_compile.capture.edit import add_op
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.errors import UnsupportedModelError
from kvquant_compile.passes import apply_rope, recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests import zoo
from tests.survey.case import build

HALF = tuple((i, i + 8) for i in range(8))
PAIRS = tuple((2 * i, 2 * i + 1) for i in range(8))
PLAIN = tuple(torch.tensor(10000.0).pow(-torch.arange(0, 16, 2).float() / 16).tolist())

# model type -> (rotated pairs, channels that pass, width)
ROTARY = {
    "llama": (HALF, 0, 16),
    "mistral": (HALF, 0, 16),
    "qwen2": (HALF, 0, 16),
    "qwen3": (tuple((i, i + 16) for i in range(16)), 0, 32),
    "gemma2": (HALF, 0, 16),
    "gemma3_text": (HALF, 0, 16),
    "gpt_neox": (tuple((i, i + 2) for i in range(2)), 12, 16),
    "cohere": (PAIRS, 0, 16),
    "phi3": (HALF, 0, 16),
    "glm": (PAIRS[:4], 8, 16),
    "gpt_oss": (HALF, 0, 16),
}
DECODERS = {"SdpaDecoder": HALF, "WindowDecoder": HALF, "IsCausalDecoder": HALF,
            "MatmulDecoder": PAIRS, "CappedDecoder": PAIRS}  # fmt: skip


def _inputs(captured, batch, tokens, past):
    gm = captured.graph_module
    values = {captured.placeholder("past"): past}
    if captured.convention == "functional":
        return {**values, captured.placeholder("ids"): zoo.tokens(batch, tokens)}
    width = captured.backbone.get_input_embeddings().weight.shape[-1]
    positions = torch.arange(past, past + tokens).repeat(batch, 1)
    values[captured.placeholder("hidden")] = torch.randn(batch, tokens, width)
    values[captured.placeholder("attention_mask")] = None
    values[captured.placeholder("position_ids")] = positions
    assert gm is not None
    return values


def _assert_key_is_rotated_key_pre(captured, layer):
    values = Evaluator(captured.graph_module, _inputs(captured, 2, 5, 0))
    with torch.no_grad():
        key, key_pre = values(layer.key), values(layer.key_pre)
    assert key_pre.shape == key.shape == (2, layer.plan.kv_heads, 5, layer.plan.key_dim)
    expected = apply_rope(key_pre, torch.arange(5), layer.plan.rope)
    torch.testing.assert_close(key.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ROTARY)
def test_rotary_models_are_proved(model_type):
    captured = zoo.captured(model_type)
    pairs, passing, width = ROTARY[model_type]
    layers = recognise(captured)
    assert [layer.plan.index for layer in layers] == [0, 1]
    for layer in layers:
        spec = layer.plan.rope
        assert layer.plan.refusal == ""
        assert spec.in_pairs == spec.out_pairs == pairs
        assert (len(spec.passthrough), spec.width) == (passing, width)
        _assert_key_is_rotated_key_pre(captured, layer)


@pytest.mark.parametrize("name", DECODERS)
def test_hand_written_decoders_are_proved(name):
    captured = zoo.captured_decoder(name)
    for layer in recognise(captured):
        assert layer.plan.rope.in_pairs == DECODERS[name]
        torch.testing.assert_close(
            torch.tensor(layer.plan.rope.frequencies), torch.tensor(PLAIN), rtol=1e-6, atol=0
        )
        _assert_key_is_rotated_key_pre(captured, layer)


@pytest.mark.parametrize("model_type", ["llama", "cohere", "gpt_neox", "gpt_oss"])
def test_frequencies_are_the_models_bit_for_bit(model_type):
    captured = zoo.captured(model_type)
    own = captured.backbone.rotary_emb.inv_freq.tolist()
    assert list(recognise(captured)[0].plan.rope.frequencies) == own


def test_attention_plans():
    def plans(model_type):
        return [layer.plan.attends[0] for layer in recognise(zoo.captured(model_type))]

    gemma, mistral, oss = plans("gemma2"), plans("mistral"), plans("gpt_oss")
    assert [p.window for p in gemma] == [8, 0]
    assert {p.softcap for p in gemma} == {5.0}
    assert {p.scale for p in gemma} == {24**-0.5}
    assert [p.window for p in mistral] == [8, 8]
    assert all(p.sink_logits for p in oss)
    assert {p.query_heads for p in gemma + mistral + oss} == {4}
    window = recognise(zoo.captured_decoder("WindowDecoder"))[0].plan.attends[0]
    assert (window.window, window.scale) == (6, 0.25)


def test_models_without_rotation_have_no_rope_and_no_refusal():
    for layer in recognise(zoo.captured("gpt2")):
        assert layer.plan.rope is None
        assert layer.plan.refusal == ""
        assert layer.key_pre is layer.key


def test_a_layer_norm_after_the_rotation_is_a_reasoned_refusal():
    (layer,) = recognise(capture(zoo.unproved(num_hidden_layers=1)))
    assert layer.plan.rope is None
    assert "no proved rotary embedding" in layer.plan.refusal
    assert layer.key_pre is layer.key


def test_scaled_rope_types():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
            "rope_theta": 10000.0}  # fmt: skip
    spec = recognise(capture(zoo.tiny("llama", rope_parameters=yarn)))[0].plan.rope
    assert spec.scale == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
    linear = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
    captured = capture(zoo.tiny("llama", rope_parameters=linear))
    layer = recognise(captured)[0]
    assert list(layer.plan.rope.frequencies) == captured.backbone.rotary_emb.inv_freq.tolist()
    _assert_key_is_rotated_key_pre(captured, layer)


def test_half_precision_keys_are_proved():
    layer = recognise(capture(zoo.tiny("cohere").to(torch.bfloat16)))[0]
    assert layer.plan.rope.in_pairs == PAIRS
    # The cast to float32 that only the rotation needs is not stored.
    assert layer.key_pre.meta["val"].dtype is torch.bfloat16


def test_certificates_are_json_and_name_the_source():
    certificate = recognise(zoo.captured("llama"))[0].plan.certificate
    assert json.loads(json.dumps(certificate)) == certificate
    assert certificate["method"] == "symbolic"
    assert certificate["pairs"] == 8
    assert certificate["group_law_residual"] < 1e-12
    assert "apply_rotary_pos_emb" in certificate["source"]


def test_recognise_twice_gives_the_same_plans():
    captured = zoo.captured_decoder("MatmulDecoder")
    first, second = recognise(captured), recognise(captured)
    assert [layer.plan for layer in first] == [layer.plan for layer in second]


def test_positions_may_be_columns_where_a_graph_takes_no_others():
    """RoFormer counts columns, padding included, and looks cos and sin up there."""
    try:
        captured = capture(build("roformer"))
    except UnsupportedModelError as error:
        if "contradicts itself" not in str(error):
            raise
        pytest.skip("in these transformers, steps of RoFormer differ from all tokens at once")
    layers = recognise(captured)
    assert {layer.plan.rope.pairing for layer in layers} == {"interleaved"}
    assert layers[0].plan.certificate["table_misfit"] < 1e-4
    assert max(validate_lossless(captured, layers).values()) < 1e-5
    graph = captured.graph_module.graph
    positions = captured.placeholder("position_ids")
    # If both are taken, columns are no positions.
    add_op(graph, positions, torch.ops.aten.neg.default, (positions,))
    assert "a table lookup at ['past']" in recognise(captured)[0].plan.refusal
