"""From token ids to what a transformers backbone is fed: embeddings, and more where it asks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

PER_LAYER, TOKEN_IDS = "per_layer_inputs", "ple_input_ids"
# Beside embedded tokens: an embedding of its own for every layer (gemma3n), and the token ids
# (qwen4_exp, which embeds groups of them); and the option that makes a backbone ask for it.
EXTRA_INPUTS = {PER_LAYER: "hidden_size_per_layer_input", TOKEN_IDS: "ple_layer_ids"}


def extra_inputs(backbone: nn.Module) -> tuple[str, ...]:
    """Which of :data:`EXTRA_INPUTS` a backbone is fed beside the hidden state."""
    config = getattr(backbone, "config", None)
    takes = inspect.signature(backbone.forward).parameters
    asked = EXTRA_INPUTS.items()
    return tuple(n for n, option in asked if n in takes and getattr(config, option, None))


def embedded(backbone: Any, ids: Tensor) -> dict[str, Tensor]:
    """The inputs of a captured graph that come from tokens, by placeholder name.

    Args:
        backbone: a transformers backbone.
        ids: int64 [B, S].

    Returns:
        ``hidden`` [B, S, width] and, where the backbone asks for them, ``per_layer_inputs``
        [B, S, layers, width] and ``ple_input_ids`` int64 [B, S].
    """
    inputs = {"hidden": backbone.get_input_embeddings()(ids)}
    for name in extra_inputs(backbone):
        inputs[name] = ids if name == TOKEN_IDS else backbone.get_per_layer_inputs(ids)
    return inputs


def random_embedded(
    backbone: Any, like: Tensor, batch: int, tokens: int, seed: int
) -> dict[str, Tensor]:
    """Random stand-ins for :func:`embedded`, on the device and, but for token ids, in the dtype
    of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    one = embedded(backbone, torch.zeros(1, 1, dtype=torch.long, device=like.device))
    found = {}
    for name, value in one.items():
        size = batch, tokens, *value.shape[2:]
        if name == TOKEN_IDS:
            most = backbone.get_input_embeddings().weight.shape[0]
            found[name] = torch.randint(most, size, generator=generator).to(like.device)
        else:
            found[name] = torch.randn(size, generator=generator).to(like)
    return found
