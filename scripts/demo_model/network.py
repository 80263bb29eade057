"""The untrained model, and its losses."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally with no mask tensor, which keeps the fused kernel available.

    Under ``torch.compile`` the stock path may build the mask, and a mask given as a tensor rules
    the fastest kernel out. Training windows are full, so causality is all the mask there is.
    """
    # Not every backend takes fewer key heads than query heads, and a silent fallback to the
    # unfused path would cost far more than these two copies.
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Stand in for the mask builder of ``causal_attention``."""


def build_model(args: argparse.Namespace) -> Any:
    """Build the untrained model."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.kv_heads,
        head_dim=64,
        max_position_embeddings=args.long_context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=True,
    )
    AttentionInterface.register("training_causal", causal_attention)
    AttentionMaskInterface.register("training_causal", no_mask)
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("training_causal")
    return model


def token_losses(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Next-token losses, one per predicted token, of windows one token longer than the input."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(batch.shape[0], -1)


def mean_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of a batch."""
    return token_losses(model, batch).mean()


@torch.no_grad()
def window_losses(model: Any, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Losses of every whole window of ``length`` tokens, one row per window.

    A window is fed alone and its first token is context only, so a row has ``length - 1`` losses.
    """
    count = ids.numel() // length
    rows = ids[: count * length].view(count, length)
    per_call = max(1, 8192 // length)
    return torch.cat([token_losses(model, part) for part in torch.split(rows, per_call)])
