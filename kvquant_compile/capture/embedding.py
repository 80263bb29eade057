"""From token ids to what a transformers backbone is fed: embeddings, and per-layer embeddings."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

PER_LAYER = "per_layer_inputs"


def has_per_layer_inputs(backbone: nn.Module) -> bool:
    """Whether every layer is fed an embedding of its own beside the hidden state (gemma3n)."""
    config = getattr(backbone, "config", None)
    takes = inspect.signature(backbone.forward).parameters
    return bool(PER_LAYER in takes and getattr(config, "hidden_size_per_layer_input", 0))


def embedded(backbone: Any, ids: Tensor) -> dict[str, Tensor]:
    """The inputs of a captured graph that come from tokens, by placeholder name.

    Args:
        backbone: a transformers backbone.
        ids: int64 [B, S].

    Returns:
        ``hidden`` [B, S, width] and, where layers have embeddings of their own,
        ``per_layer_inputs`` [B, S, layers, width].
    """
    inputs = {"hidden": backbone.get_input_embeddings()(ids)}
    if has_per_layer_inputs(backbone):
        inputs[PER_LAYER] = backbone.get_per_layer_inputs(ids)
    return inputs


def random_embedded(
    backbone: Any, like: Tensor, batch: int, tokens: int, seed: int
) -> dict[str, Tensor]:
    """Random stand-ins for :func:`embedded`, in dtype and on the device of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    one = embedded(backbone, torch.zeros(1, 1, dtype=torch.long, device=like.device))
    return {
        name: torch.randn(batch, tokens, *value.shape[2:], generator=generator).to(like)
        for name, value in one.items()
    }
