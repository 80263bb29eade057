"""Tiny random decoders for tests: transformers models and hand-written ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import fx, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvquant_compile.capture import Captured, capture
from tests import decoders

VOCAB = 128

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}

# What differs from the common table, by model type.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED},
    "mistral": {**_GROUPED, "sliding_window": 8, "head_dim": 16},
    "qwen2": {**_GROUPED},
    "qwen3": {**_GROUPED, "head_dim": 32},
    "gemma2": {
        **_GROUPED,
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        **_GROUPED,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {"partial_rotary_factor": 0.25},
    "cohere": {**_GROUPED},
    "phi3": {**_GROUPED, "sliding_window": 8},
    "gpt2": {"n_positions": 512},
    "gptj": {"rotary_dim": 8, "n_positions": 512},
    "falcon": {},
    "hunyuan_v1_dense": {**_GROUPED, "head_dim": 16},
    "olmo2": {**_GROUPED},
    "glm": {**_GROUPED, "head_dim": 16},
    "gpt_oss": {
        **_GROUPED,
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def tiny(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random causal LM with every parameter randomised, norm weights and biases too.

    Weights of 1 in a norm hide it from numeric probes, so none is left at its initial value.
    """
    settings = {**_SMALL, **_OWN.get(model_type, {}), **overrides}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    return randomise(model, seed).eval()


def unproved(**overrides: Any) -> PreTrainedModel:
    """A model with a layer norm behind its keys' RoPE, which cannot be stored before it."""
    model = tiny("hunyuan_v1_dense", **overrides)
    for layer in model.model.layers:
        layer.self_attn.key_layernorm = nn.LayerNorm(layer.self_attn.head_dim)
    return model


def randomise(model: Any, seed: int = 0) -> Any:
    """Perturb every parameter in place but frozen ones (tables of cos and sin); deterministic for
    a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.requires_grad:
                parameter.add_(noise, alpha=0.1 if parameter.ndim > 1 else 0.3)
    return model


def tokens(batch: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


@functools.cache
def captured(model_type: str) -> Captured:
    """The capture of ``tiny(model_type)``; shared by tests, which must not change its graph."""
    return capture(tiny(model_type))


@functools.cache
def captured_decoder(name: str) -> Captured:
    """The capture of a hand-written decoder of :mod:`tests.decoders`; shared by tests."""
    return capture(decoder(name), (tokens(), None))


def decoder(name: str) -> nn.Module:
    """A randomised hand-written decoder of :mod:`tests.decoders`."""
    torch.manual_seed(0)
    return randomise(getattr(decoders, name)())


def clone_graph(original: Captured) -> Captured:
    """The same capture over a copy of its graph, which may be changed; weights are shared."""
    gm = original.graph_module
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}), gm.graph.output_node().type)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    return dataclasses.replace(original, graph_module=fx.GraphModule(gm, graph))
