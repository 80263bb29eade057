"""Which module of a transformers model is its text decoder, and which models have none."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from kvquant_compile.capture.failures import OTHER_MODEL, definition_line
from kvquant_compile.errors import UnsupportedModelError


def refuse_by_config(model: PreTrainedModel) -> None:
    """Refuse what the configuration alone rules out.

    Raises:
        UnsupportedModelError: encoder-decoder, dynamic RoPE, or weights on the meta device.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} cannot be captured", why="it is an encoder-decoder model", do=OTHER_MODEL
        )
    if _mentions_dynamic_rope(model.config.to_dict()):
        raise UnsupportedModelError(
            f"{name} cannot be captured",
            why='its rope_type is "dynamic": cos and sin depend on data (the longest position'
            " seen so far), so no cached key has one fixed rotation",
            do='Set another rope_type in the config, such as "yarn" or "linear".',
        )
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError(
            f"{name} cannot be captured",
            why="parameters are on the meta device, so the graph cannot be compared with it",
            do="Load the weights first.",
        )


def _mentions_dynamic_rope(config: Any) -> bool:
    if isinstance(config, dict):
        named = config.get("rope_type", config.get("type"))
        return named == "dynamic" or any(map(_mentions_dynamic_rope, config.values()))
    return False


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The module that maps embedded tokens and a cache to the last hidden state.

    Raises:
        UnsupportedModelError: there is none, so the model keeps no key-value cache.
    """
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if not isinstance(backbone, PreTrainedModel) or backbone.get_output_embeddings() is not None:
        inner = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        headless = [m for m in inner if m.get_output_embeddings() is None]
        backbone = (headless or [model])[0]
    takes = inspect.signature(backbone.forward).parameters
    missing = [name for name in ("inputs_embeds", "past_key_values") if name not in takes]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be captured",
            where=f"{type(backbone).__name__}, {definition_line(type(backbone))}",
            why=f"its forward takes no {' and no '.join(missing)}"
            + (
                ": it is no decoder with a key-value cache"
                if len(missing) > 1 or missing == ["past_key_values"]
                else ", behind which it could be captured"
            ),
            do=OTHER_MODEL,
        )
    return backbone
