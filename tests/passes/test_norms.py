"""Norms behind a rotation are moved before it, and weights to the query, where that is the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kvquant_compile.capture import capture
from kvquant_compile.capture.markers import ATTEND
from kvquant_compile.errors import KVQuantError
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests import zoo
from tests.survey.case import build

_WIDTH = 16


def _recognised(model):
    captured = capture(model)
    return captured, recognise(captured)


@pytest.mark.parametrize("model_type", ["nanochat", "llama4_text"])
def test_keys_with_a_norm_behind_rope_are_stored_before_both(model_type):
    captured, layers = _recognised(build(model_type))
    assert not [layer.plan.refusal for layer in layers if layer.plan.refusal]
    assert layers[0].plan.rope is not None
    assert layers[0].plan.certificate["moved"]["norm"]
    assert max(validate_lossless(captured, layers).values()) < 1e-5


class _Norm(nn.Module):
    """A norm of head vectors [B, H, S, 16], or what looks like one."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.linspace(-0.5, 1.5, _WIDTH))

    def forward(self, x):
        return getattr(self, self.kind.replace(" ", "_"))(x)

    def plain(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    # Those that can be moved.
    def weights_behind(self, x):
        return self.plain(x) * self.weight

    def weights_twice(self, x):
        return (self.weight + 1)[None, None, None] * (self.weight * self.plain(x).float())

    def weights_alone(self, x):
        return x * self.weight

    def torch_rms_norm(self, x):
        return F.rms_norm(x, (_WIDTH,), self.weight, 1e-6)

    def unit_length(self, x):
        return F.normalize(x, dim=-1) * self.weight

    def square_root_of_a_sum(self, x):
        return x * 4 / (x * x).sum(-1, keepdim=True).sqrt().clamp_min(1e-6)

    def weights_and_layout(self, x):
        return (self.plain(x).transpose(1, 2) * self.weight).contiguous().transpose(1, 2)

    # Those that cannot.
    def weights_before(self, x):
        return self.plain(x * self.weight)

    def largest(self, x):  # depends on more than the length
        return x / (x.pow(2).amax(-1, keepdim=True) + 1e-6).sqrt()

    def mean_taken_off(self, x):
        return self.plain(x - x.mean(-1, keepdim=True))

    def layer_norm(self, x):
        return F.layer_norm(x, (_WIDTH,), self.weight)

    def cubed(self, x):
        return x * x.pow(2)

    def length_of_a_part(self, x):
        return x * torch.rsqrt(x[..., :8].pow(2).mean(-1, keepdim=True) + 1e-6)

    def norm_of_a_part(self, x):
        return torch.cat([self.plain(x[..., :8]), x[..., 8:]], -1)

    def length_by_a_channel(self, x):
        return x * torch.rsqrt(x.pow(2)[..., :1] + 1e-6)

    def lengths_of_other_heads(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).roll(1, 1)

    def heads_together(self, x):
        return x * torch.rsqrt(x.pow(2).mean((1, 3), keepdim=True) + 1e-6)

    def weights_of_heads(self, x):
        return self.plain(x) * self.weight[: x.shape[1], None, None]

    def weights_by_length(self, x):
        return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight)

    def shifted(self, x):
        return self.plain(x) * self.weight + self.weight

    def rolled_behind_weights(self, x):
        return (self.plain(x) * self.weight).roll(1, -1)

    def weights_of_the_token(self, x):
        return self.plain(x) * x.sigmoid()


def _with(*kinds):
    """A model with a norm of another kind behind the keys of every layer."""
    model = zoo.tiny("hunyuan_v1_dense", num_hidden_layers=len(kinds), hidden_size=32)
    for layer, kind in zip(model.model.layers, kinds, strict=True):
        layer.self_attn.key_layernorm = _Norm(kind)
    return model


def test_what_is_a_function_of_the_length_moves():
    kinds = ("plain", "weights behind", "weights twice", "weights alone", "torch rms norm",
             "unit length", "square root of a sum", "weights and layout")  # fmt: skip
    captured, layers = _recognised(_with(*kinds))
    assert {kind: layer.plan.refusal for kind, layer in zip(kinds, layers, strict=True)} == (
        dict.fromkeys(kinds, "")
    )
    for kind, layer in zip(kinds, layers, strict=True):
        moved = layer.plan.certificate["moved"]
        assert moved["relative_error"] < 1e-6, kind
        assert moved["norm"] == (kind != "weights alone")
    assert max(validate_lossless(captured, layers).values()) < 1e-5


def test_what_no_rotation_passes_through_stays_behind():
    kinds = (
        "weights before", "largest", "mean taken off", "layer norm", "cubed", "length of a part",
        "norm of a part", "length by a channel", "lengths of other heads", "heads together",
        "weights of heads", "weights by length", "shifted", "rolled behind weights",
        "weights of the token",
    )  # fmt: skip
    _, layers = _recognised(_with(*kinds))
    for kind, layer in zip(kinds, layers, strict=True):
        assert layer.plan.rope is None, kind
        assert layer.plan.refusal, kind
        assert layer.key_pre is layer.key
        assert "moved" not in layer.plan.certificate
    assert "aten.amax.default of its squares" in layers[1].plan.refusal


def test_a_scaled_rotation_does_not_pass_a_norm():
    """The norm takes off the factor which YaRN puts on; a moved norm would leave it on."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
            "rope_theta": 10000.0}  # fmt: skip
    model = zoo.tiny("hunyuan_v1_dense", num_hidden_layers=1, hidden_size=32, rope_parameters=yarn)
    captured, (layer,) = _recognised(model)
    assert "with its norm before it, keys are others" in layer.plan.refusal
    assert max(validate_lossless(captured, [layer]).values()) < 1e-5


def test_weights_are_read_from_the_model_and_reach_every_query_head_of_a_group():
    captured, (layer,) = _recognised(_with("weights behind"))
    name = "backbone.layers.0.self_attn.key_layernorm.weight"
    assert layer.plan.certificate["moved"]["weights_to_query"] == [name]
    (attend,) = captured.graph_module.graph.find_nodes(op="call_function", target=ATTEND)
    query, weight = attend.args[0].args
    assert weight.target == name  # the parameter itself: no copy that could grow stale
    assert query.meta["val"].shape[1] == 4 != layer.plan.kv_heads
    attend.update_arg(0, query)
    captured.graph_module.recompile()
    with pytest.raises(KVQuantError, match="differ"):
        validate_lossless(captured, [layer])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = zoo.tiny("hunyuan_v1_dense", num_hidden_layers=1, hidden_size=32).to(dtype)
    captured, (layer,) = _recognised(model)
    assert layer.plan.rope is not None
    assert layer.key_pre.meta["val"].dtype is dtype
    validate_lossless(captured, [layer])
