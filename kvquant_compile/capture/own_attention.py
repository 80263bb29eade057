"""Capture of transformers models whose attention is code of their own.

No marker fires in them. They are exported with the cache's tensors as inputs instead, as
hand-written decoders are; appends are then the concatenations with these inputs, and attention is
found by what it computes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from kvquant_compile.capture.attention_sites import mark_attention
from kvquant_compile.capture.cache_inputs import mark_appends
from kvquant_compile.capture.capture_cache import Firings, capture_cache
from kvquant_compile.capture.captured import CacheLayout
from kvquant_compile.capture.cleanup import flat_graph
from kvquant_compile.capture.mask_kind import MaskKind
from kvquant_compile.errors import UnsupportedLayerError, UnsupportedModelError


class _Flat(nn.Module):
    """The backbone with flat inputs, the cache's tensors among them."""

    def __init__(self, backbone: nn.Module, config: Any) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        self.takes = set(inspect.signature(backbone.forward).parameters)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor, position_ids: Tensor, caches: list[Tensor]
    ) -> list[Tensor]:
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        cache = plain_cache(self.config, caches)
        out = self.backbone(
            inputs_embeds=hidden,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in inputs.items() if name in self.takes},
        )
        grown = [t for layer in _filled(cache) for t in (layer.keys, layer.values)]
        return [out.last_hidden_state, *grown]


def plain_cache(config: Any, caches: list[Tensor]) -> DynamicCache:
    """A cache of plain layers, windowed ones too, that hold the given keys and values.

    Raises:
        UnsupportedModelError: a layer keeps another state than keys and values.
    """
    cache = capture_cache(config, 0, Firings())
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        raise UnsupportedModelError(
            "the model cannot be captured",
            why="it computes attention in code of its own, beside layers with a recurrent state",
            do="Report the model.",
        )
    pairs = list(zip(caches[::2], caches[1::2], strict=True))
    count = max(len(cache.layers), len(pairs))
    cache.layers = [DynamicLayer() for _ in range(count)]
    for i, (keys, values) in enumerate(pairs):
        cache.layers[i] = layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def _filled(cache: DynamicCache) -> list[DynamicLayer]:
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return [layer for layer in layers if layer.is_initialized]


def export_own(
    backbone: PreTrainedModel, config: Any, inputs: tuple[Any, ...], before: tuple[Any, ...]
) -> tuple[torch.export.ExportedProgram, CacheLayout]:
    """Export the backbone behind a cache that holds some tokens.

    Args:
        backbone: of the model, in evaluation mode.
        config: of its text decoder.
        inputs: (hidden, attention_mask, position_ids) of the traced step.
        before: the same of the tokens before it.

    Raises:
        Exception: whatever the model or the exporter raises.
    """
    flat = _Flat(backbone, config)
    _, *caches = flat(*before, [])
    leaves = tuple((i // 2, "value" if i % 2 else "key") for i in range(len(caches)))
    _check_axes(caches, before[0].shape)
    two = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = {"hidden": two, "attention_mask": two, "position_ids": two,
              "caches": [{0: Dim.AUTO, 2: Dim.AUTO} for _ in caches]}  # fmt: skip
    program = torch.export.export(
        flat,
        (*inputs, [t.clone() for t in caches]),
        dynamic_shapes=shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    return program, CacheLayout(None, leaves, (True,) * len(caches))


def _check_axes(caches: list[Tensor], step: torch.Size) -> None:
    for i, tensor in enumerate(caches):
        if tensor.ndim != 4 or (tensor.shape[0], tensor.shape[2]) != (step[0], step[1]):
            raise UnsupportedLayerError(
                "a cache layer cannot be captured",
                where=f"layer {i // 2}",
                why=f"it caches a tensor of shape {list(tensor.shape)}, not [B, heads, S, width]",
                do="Report the model.",
            )


def marked_graph(
    program: torch.export.ExportedProgram, layout: CacheLayout
) -> tuple[fx.GraphModule, Firings]:
    """The exported program with markers, and what they would have seen.

    Raises:
        UnsupportedLayerError: an append or an attention of unknown meaning.
    """
    # Without in-place operations: what attention code leaves behind would look alive.
    gm = flat_graph(program.run_decompositions({}), all_outputs=True)
    mark_appends(gm, layout)
    meanings = mark_attention(gm)
    masks = [MaskKind(meaning.kind, meaning.window) for meaning in meanings]
    return gm, Firings(len(layout.leaves) // 2, len(meanings), masks)
