"""Biases that queries compute by distance are found before they are spread, or refused."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvquant_compile.capture import capture
from kvquant_compile.capture.markers import ATTEND
from kvquant_compile.capture.reference import exact_attention
from kvquant_compile.errors import KVQuantError, UnsupportedLayerError
from kvquant_compile.lowering.score_bias import by_distance
from kvquant_compile.passes.distance_bias import distance_bias
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.passes.taint import taint
from kvquant_compile.runtime.validate import validate_lossless
from tests.survey.case import build
from tests.survey.shrink import tiny_config
from tests.zoo import randomise

pytestmark = pytest.mark.skipif(
    "inkling2_text" not in CONFIG_MAPPING, reason="transformers without Inkling"
)


@pytest.mark.parametrize("model_type", ["inkling_text", "inkling2_text"])
def test_biases_and_sinks_of_queries(model_type):
    model = build(model_type)
    # As in its published configuration: scores of late queries grow, and so do their biases.
    model.config.log_scaling_n_floor, model.config.log_scaling_alpha = 4, 0.5
    captured = capture(model)
    layers = recognise(captured)
    sites = [layer.plan.attends[0] for layer in layers]
    assert [(site.window, site.bias_extent) for site in sites] == [(8, 8), (0, 64)]
    assert {site.query_sinks for site in sites} == {model_type == "inkling2_text"}
    (evidence,) = layers[1].plan.certificate["distance_bias"]
    assert evidence["extent"] == 64
    assert [3, 128] in evidence["sizes"]
    assert evidence["factors"] == (3 if model_type == "inkling_text" else 0)
    assert max(validate_lossless(captured, layers).values()) < 1e-5


def _spread(relative_states, proj, queries, keys):
    logits = (relative_states @ proj).transpose(1, 2)
    distance = (queries[:, None] - keys)[None, None]
    return logits, distance, distance.clamp(0, proj.shape[1] - 1).expand(*logits.shape[:2], -1, -1)


def _off_by_one(self, states, queries, keys):
    logits, distance, _ = _spread(states, self.proj, queries, keys)
    index = (distance + 1).clamp(0, self.rel_extent - 1).expand(*logits.shape[:2], -1, -1)
    return logits.gather(-1, index).masked_fill(distance >= self.rel_extent, 0.0)


def _last_one_goes_on(self, states, queries, keys):
    logits, _, index = _spread(states, self.proj, queries, keys)
    return logits.gather(-1, index)


def _by_place_of_the_key(self, states, queries, keys):
    logits, distance, _ = _spread(states, self.proj, queries, keys)
    index = keys.clamp(max=self.rel_extent - 1).expand(*logits.shape[:2], queries.shape[0], -1)
    return logits.gather(-1, index).masked_fill(distance >= self.rel_extent, 0.0)


def _fading(self, states, queries, keys):
    logits, distance, index = _spread(states, self.proj, queries, keys)
    near = logits.gather(-1, index).masked_fill(distance >= self.rel_extent, 0.0)
    return near / (1 + distance.clamp(min=0))


def _of_two_sources(self, states, queries, keys):
    logits, distance, index = _spread(states, self.proj, queries, keys)
    both = logits.gather(-1, index) + states.mean(-1).transpose(1, 2)[..., None]
    return both.masked_fill(distance >= self.rel_extent, 0.0)


def test_other_biases_are_refused():
    spreads = (_off_by_one, _last_one_goes_on, _by_place_of_the_key, _fading, _of_two_sources)
    config = tiny_config("inkling_text")
    config.num_hidden_layers = count = len(spreads)
    config.layer_types, config.mlp_layer_types = ["hybrid"] * count, ["dense"] * count
    model = randomise(AutoModelForCausalLM.from_config(config)).eval()
    for layer, spread in zip(model.model.layers, spreads, strict=True):
        module = layer.self_attn.rel_logits_proj
        module.forward = functools.partial(spread, module)
    captured = capture(model)
    graph = captured.graph_module.graph
    known = taint(graph, *captured.data_inputs)
    attends = graph.find_nodes(op="call_function", target=ATTEND)
    assert len(attends) == count
    for attend in attends:
        with pytest.raises(UnsupportedLayerError, match="adds a tensor of its own to the scores"):
            distance_bias(captured, known, attend)


def test_sinks_of_another_shape_are_refused(monkeypatch):
    model = build("inkling2_text")
    attention = type(model.model.layers[0].self_attn)
    projected = attention.forward

    def forward(self, hidden_states, *args, **kwargs):
        self.sink_proj.out_features = 1
        self.sink_proj.weight.data = self.sink_proj.weight.data[:1]
        return projected(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(KVQuantError, match=r"sinks of shape \[2, 1, 6, 1\]"):
        capture(model)


def test_bias_and_sinks_are_part_of_the_softmax():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    bias, sinks = torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 1)
    got = exact_attention(q, k, v, None, sinks, 0.5, 0.0, None, bias)
    scores = torch.cat([q @ k.transpose(2, 3) * 0.5 + bias, sinks], -1)
    expected = scores.softmax(-1)[..., :-1] @ v
    torch.testing.assert_close(got, expected.transpose(1, 2))


def test_what_is_as_far_as_the_extent_has_no_bias():
    logits = torch.arange(1.0, 4).view(1, 1, 1, 1, 3)
    distance = torch.tensor([4, 3, 2, 1, 0, -1]).view(1, 1, 1, 1, -1)
    assert by_distance(logits, distance).flatten().tolist() == [0, 0, 3, 2, 1, 0]
