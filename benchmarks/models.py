"""Decoders of known shapes with random weights, made where they run; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "rope_theta": 10000.0,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
        "rope_theta": 10000.0,
    },
}  # fmt: skip


def random_llama(shape: str, device: torch.device, layers: int | None = None) -> LlamaForCausalLM:
    """A bfloat16 Llama of a shape of :data:`SHAPES`, in evaluation mode."""
    settings = dict(SHAPES[shape])
    theta = settings.pop("rope_theta")
    if layers is not None:
        settings["num_hidden_layers"] = layers
    config = LlamaConfig(
        **settings,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        max_position_embeddings=2**21,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def cache_bytes(shape: str, tokens: int, batch: int, bits: float = 16) -> float:
    """Bytes of keys and values at ``bits`` an element."""
    s = SHAPES[shape]
    width = s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"]
    return 2 * s["num_hidden_layers"] * width * tokens * batch * bits / 8
