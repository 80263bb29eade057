"""Transformers models whose attention is code of their own: found by what it computes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kvquant_compile.capture import ATTEND, capture
from kvquant_compile.capture.reference import exact_attention
from kvquant_compile.errors import UnsupportedLayerError, UnsupportedModelError
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests import decoders, zoo
from tests.survey.case import build


def _attends(captured):
    return captured.graph_module.graph.find_nodes(op="call_function", target=ATTEND)


def test_gptj_rotates_by_a_gathered_table():
    captured = capture(build("gptj"))
    layers = recognise(captured)
    assert [layer.plan.rope.pairing for layer in layers] == ["interleaved"] * 2
    assert [len(layer.plan.rope.in_pairs) for layer in layers] == [4, 4]
    assert max(validate_lossless(captured, layers).values()) < 1e-5


def test_windows_in_a_table_of_the_model_are_found():
    captured = capture(build("gpt_neo"))
    assert [layer.plan.attends[0].window for layer in recognise(captured)] == [0, 8]
    assert [node.args[6] for node in _attends(captured)] == [1.0, 1.0]  # it does not scale


@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_slopes_of_alibi_are_read(model_type):
    captured = capture(build(model_type))
    layers = recognise(captured)
    assert all(plan.position_bias for layer in layers for plan in layer.plan.attends)
    slopes = captured.graph_module.get_buffer(_attends(captured)[0].args[10].target)
    assert slopes.tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert max(validate_lossless(captured, layers).values()) < 1e-5


class _Biased(decoders._MatmulBlock):
    """ALiBi with slopes of its own, or a bias that is not linear in the distance."""

    slopes = torch.tensor([0.7, 0.013, -0.2, 3e-5])
    power = 1.0

    def attention(self, x, rope, past):
        q, k, v = self.heads(x)
        k, v = cache = decoders._join(past, k, v, 1)
        k, v = (t.repeat_interleave(2, dim=2).transpose(1, 2) for t in (k, v))
        length, total = x.shape[1], k.shape[2]
        distance = torch.arange(total) - torch.arange(total - length, total)[:, None]
        bias = self.slopes[:, None, None] * -((-distance).clamp(min=0) ** self.power)
        scores = q.transpose(1, 2) @ k.transpose(2, 3) / math.sqrt(decoders.WIDTH) + bias
        weights = F.softmax(scores.masked_fill(distance > 0, -torch.inf), dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2), cache


def _decoder(block: type[nn.Module]) -> nn.Module:
    class Decoder(decoders.MatmulDecoder):
        pass

    Decoder.block = block
    return zoo.randomise(Decoder())


def test_slopes_that_are_no_power_of_two_are_read():
    captured = capture(_decoder(_Biased), (zoo.tokens(), None))
    slopes = captured.graph_module.get_buffer(_attends(captured)[0].args[10].target)
    torch.testing.assert_close(slopes, _Biased.slopes, rtol=1e-4, atol=1e-7)
    assert max(validate_lossless(captured, recognise(captured)).values()) < 1e-4


def test_a_bias_that_is_not_linear_is_refused():
    class Root(_Biased):
        power = 0.5

    with pytest.raises((UnsupportedLayerError, UnsupportedModelError)):
        capture(_decoder(Root), (zoo.tokens(), None))


def test_exact_attention_with_slopes_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator) for n in (2, 5, 5))
    slopes = torch.tensor([0.5, -0.25])
    got = exact_attention(q, k, v, None, None, 0.5, 0.0, slopes)
    place = torch.arange(5.0)
    bias = slopes[:, None, None] * (place - place[3:, None])
    weights = torch.softmax(q @ k.transpose(2, 3) * 0.5 + bias, -1)
    torch.testing.assert_close(got, (weights @ v).transpose(1, 2))
