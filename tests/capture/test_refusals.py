from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvquant_compile.capture import capture
from kvquant_compile.errors import OptionError, UnsupportedLayerError, UnsupportedModelError
from tests import decoders, zoo
from tests.survey.case import build

_TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip


def _bert():
    return AutoModel.from_config(AutoConfig.for_model("bert", **_TINY))


def _vit():
    return AutoModel.from_config(
        AutoConfig.for_model("vit", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=48, image_size=16, patch_size=8)
    )  # fmt: skip


def _t5():
    return AutoModel.from_config(
        AutoConfig.for_model("t5", vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2,
                             num_heads=2)
    )  # fmt: skip


def _mamba():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2,
                             state_size=4)
    )  # fmt: skip


def _dynamic():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return zoo.tiny("llama", rope_parameters=rope)


def _meta():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_TINY))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_bert, "it is no decoder: its tokens attend to later ones"),
        (_vit, "no decoder with a key-value cache"),
        (_t5, "encoder-decoder"),
        (_mamba, "no decoder with a key-value cache"),
        (_dynamic, "cos and sin depend on data"),
        (_meta, "meta device"),
    ],
)
def test_models_that_cannot_be_captured_say_why(build, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(build())


def test_a_refused_model_is_left_as_it_was():
    model = _dynamic().train()
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError):
        capture(model)
    assert model.training
    assert model.config._attn_implementation == implementation


def test_unknown_attention_arguments_are_refused():
    model = zoo.tiny("llama")
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def biased(*args, **kwargs):
        return original(*args, position_bias=torch.zeros(1), **kwargs)

    attention.forward = biased
    with pytest.raises(UnsupportedLayerError, match="position_bias"):
        capture(model)


def test_functional_models_need_example_inputs():
    with pytest.raises(OptionError, match="example_inputs"):
        capture(zoo.decoder("SdpaDecoder"))


class _NoCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(decoders.VOCAB, 8)

    def forward(self, ids, past):
        return self.embed(ids), None


class _Relu(decoders._MatmulBlock):
    def attention(self, x, rope, past):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        k, v = cache = decoders._join(past, k, v, 2)
        q = q.unflatten(1, (decoders.KV_HEADS, -1)).mean(2)
        out = torch.relu(q @ k.transpose(2, 3)) @ v
        return out.repeat(1, 2, 1, 1).transpose(1, 2).flatten(2), cache


class _TiledBlock(decoders._SdpaBlock):
    """Query head h reads kv head h % 2: another grouping than every model's."""

    def attention(self, x, rope, past):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        k, v = cache = decoders._join(past, k, v, 2)
        total, length = k.shape[2], x.shape[1]
        mask = torch.arange(total)[None] <= torch.arange(total - length, total)[:, None]
        k, v = (t.repeat(1, 2, 1, 1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2), cache


class _BandBlock(decoders._SdpaBlock):
    """Every second key is hidden: a mask that is neither causal nor a window."""

    def attention(self, x, rope, past):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        k, v = cache = decoders._join(past, k, v, 2)
        total, length = k.shape[2], x.shape[1]
        at, keys = torch.arange(total - length, total)[:, None], torch.arange(total)[None]
        mask = (keys <= at) & ((at - keys) % 2 == 0)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2), cache


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (_Relu, "its mask is neither|cannot be run|no softmax attention"),
        (_TiledBlock, "no softmax attention over repeated heads"),
        (_BandBlock, "neither causal nor a sliding window"),
    ],
)
def test_functional_attention_of_another_meaning_is_refused(block, reason):
    class Decoder(decoders.SdpaDecoder):
        pass

    Decoder.block = block
    with pytest.raises(UnsupportedLayerError, match=reason):
        capture(zoo.randomise(Decoder()), (zoo.tokens(), None))


def test_a_module_without_a_cache_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"cache|fails"):
        capture(_NoCache(), (zoo.tokens(), None))


def test_an_original_that_contradicts_itself_is_said_to():
    with pytest.raises(UnsupportedModelError, match="the original contradicts itself"):
        capture(build("git"))


def test_a_cache_that_never_forgets_within_the_context_is_one():
    assert capture(build("moshi")).evidence["appends"] == 2


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("doge", r"DogeAttention, layer 0, modeling_doge.py:\d+: attn_output.*tensor \[2, 4"),
        ("cpmant", r"CpmAntModel, modeling_cpmant.py:\d+.*takes no inputs_embeds"),
    ],
)
def test_refusals_name_the_line_and_the_reason(model_type, said):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("these transformers have no such type")
    with pytest.raises((UnsupportedLayerError, UnsupportedModelError), match=said):
        capture(build(model_type))
