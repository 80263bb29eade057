"""Export of transformers models with the cache's tensors as inputs, as of hand-written decoders.

Appends are then the concatenations with these inputs. It serves models whose attention is code of
their own, where no marker fires and attention is found by what it computes; and models that
compute with what they have cached before they attend to it, whose shapes must be the true ones.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer

from kvquant_compile.capture.attention_sites import mark_attention
from kvquant_compile.capture.cache_inputs import mark_appends
from kvquant_compile.capture.capture_cache import (
    CaptureHybridLayer,
    CaptureIndexedLayer,
    CaptureLayer,
    Firings,
    capture_cache,
)
from kvquant_compile.capture.captured import CacheLayout
from kvquant_compile.capture.cleanup import flat_graph
from kvquant_compile.capture.mask_kind import MaskKind
from kvquant_compile.capture.own_cache import CacheKind
from kvquant_compile.errors import UnsupportedLayerError, UnsupportedModelError
from kvquant_compile.observer import SILENT, Observer


class _Flat(nn.Module):
    """The backbone with flat inputs, the cache's tensors among them."""

    def __init__(self, backbone: nn.Module, kind: CacheKind) -> None:
        super().__init__()
        self.backbone, self.kind = backbone, kind
        self.takes = set(inspect.signature(backbone.forward).parameters)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor, position_ids: Tensor, caches: list[Tensor]
    ) -> list[Tensor]:
        cache = plain_cache(self.kind, caches)
        out = self.step(hidden, attention_mask, position_ids, cache)
        return [out, *_tensors(cache)]

    def step(
        self, hidden: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: DynamicCache
    ) -> Tensor:
        """The last hidden state; the cache grows."""
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        out = self.backbone(
            inputs_embeds=hidden,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in inputs.items() if name in self.takes},
        )
        return out.last_hidden_state


def plain_cache(kind: CacheKind, caches: list[Tensor]) -> DynamicCache:
    """A cache of plain layers, windowed ones too, that hold the given keys and values.

    Layers with nothing but a recurrent state stay, and have no tensors among the given.

    Raises:
        UnsupportedModelError: a layer keeps another state than keys and values.
    """
    cache = capture_cache(kind, 0, Firings())
    if kind.own or any(isinstance(layer, CaptureHybridLayer) for layer in cache.layers):
        raise UnsupportedModelError(
            "the model cannot be captured",
            why="its cache keeps keys, values and states together, and its attention is code of"
            " its own, or attends to keys that are computed from the cached ones",
            do="Report the model.",
        )
    cache.layers = [
        _like(layer) if isinstance(layer, CaptureLayer) else layer for layer in cache.layers
    ]
    missing = len(caches) // 2 - len(_plain(cache))
    cache.layers += [DynamicLayer() for _ in range(missing)]
    pairs = zip(caches[::2], caches[1::2], strict=True)
    for (_, layer), (keys, values) in zip(_plain(cache), pairs, strict=False):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def _like(layer: CaptureLayer) -> DynamicLayer:
    """An empty layer that keeps keys, values and, where the given one does, an index."""
    return DynamicIndexedLayer() if isinstance(layer, CaptureIndexedLayer) else DynamicLayer()


def _plain(cache: DynamicCache) -> list[tuple[int, DynamicLayer]]:
    return [(i, x) for i, x in enumerate(cache.layers) if isinstance(x, DynamicLayer)]


def _filled(cache: DynamicCache) -> list[tuple[int, DynamicLayer]]:
    return [(i, layer) for i, layer in _plain(cache) if layer.is_initialized]


def _tensors(cache: DynamicCache) -> list[Tensor]:
    pairs = [(layer.keys, layer.values) for _, layer in _filled(cache)]
    return [tensor for pair in pairs for tensor in pair if tensor is not None]


@dataclass(frozen=True)
class CacheInputs:
    """Keys and values of some tokens, as inputs of an export, and how they are laid out."""

    tensors: list[Tensor]
    layout: CacheLayout


def cache_inputs(
    backbone: PreTrainedModel, kind: CacheKind, before: tuple[Any, ...]
) -> CacheInputs:
    """What the model's own layers cache of some tokens.

    Args:
        backbone: of the model, in evaluation mode.
        kind: how its cache is made.
        before: (hidden, attention_mask, position_ids) of the tokens.

    Raises:
        UnsupportedLayerError: a layer caches tensors of other axes than [B, heads, S, width].
    """
    flat = _Flat(backbone, kind)
    cache = plain_cache(kind, [])
    hidden, attention_mask, position_ids = before
    flat.step(hidden, attention_mask, position_ids, cache)
    filled = _filled(cache)
    tensors = [tensor.clone() for tensor in _tensors(cache)]
    _check_axes(tensors, before[0].shape)
    leaves = tuple((i, name) for i, _ in filled for name in ("key", "value"))
    return CacheInputs(tensors, CacheLayout(None, leaves, (True,) * len(leaves)))


def export_with_cache(
    backbone: PreTrainedModel, kind: CacheKind, inputs: tuple[Any, ...], caches: CacheInputs
) -> torch.export.ExportedProgram:
    """Export the backbone behind a cache that holds some tokens.

    Args:
        backbone, kind: as of :func:`cache_inputs`.
        inputs: (hidden, attention_mask, position_ids) of the traced step.
        caches: of the tokens before it.

    Raises:
        Exception: whatever the model or the exporter raises.
    """
    two = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = {"hidden": two, "attention_mask": two, "position_ids": two,
              "caches": [{0: Dim.AUTO, 2: Dim.AUTO} for _ in caches.tensors]}  # fmt: skip
    return torch.export.export(
        _Flat(backbone, kind),
        (*inputs, caches.tensors),
        dynamic_shapes=shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


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
    program: torch.export.ExportedProgram, layout: CacheLayout, observer: Observer = SILENT
) -> tuple[fx.GraphModule, Firings]:
    """The exported program with markers, and what they would have seen.

    Raises:
        UnsupportedLayerError: an append or an attention of unknown meaning.
    """
    # Without in-place operations: what attention code leaves behind would look alive.
    gm = flat_graph(program.run_decompositions({}), all_outputs=True)
    observer.graph("exported", gm)
    mark_appends(gm, layout)
    meanings = mark_attention(gm)
    masks = [MaskKind(meaning.kind, meaning.window) for meaning in meanings]
    return gm, Firings(len(layout.leaves) // 2, len(meanings), masks)
