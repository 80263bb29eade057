"""The result of a capture: a flat graph with markers, and what is needed to plug it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from kvquant_compile.capture.decoder import Decoder
from kvquant_compile.capture.embedding import EXTRA_INPUTS
from kvquant_compile.capture.own_cache import CacheKind

Convention = Literal["transformers", "functional"]


@dataclass(frozen=True)
class CacheLayout:
    """How a functional decoder spells its cache.

    Attributes:
        spec: pytree structure of ``past``; its leaves are the tensors of ``leaves``, in order.
        leaves: (layer, "key" | "value") of every leaf.
        heads_first: [B, H, S, D] if true, [B, S, H, D] otherwise; per leaf.
    """

    spec: Any
    leaves: tuple[tuple[int, str], ...]
    heads_first: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Captured:
    """A decoder as one flat graph in which KV append, mask and attention are marker nodes.

    Placeholders, in order: ``hidden`` [B, S, hidden] (the embedded tokens), ``attention_mask``
    [B, past + S] or None, ``position_ids`` [B, S] int64, ``past`` int for the transformers
    convention, followed by ``per_layer_inputs`` [B, S, layers, width], ``ple_input_ids`` [B, S]
    and ``states`` (a cache or None) where the model has them; ``ids`` [B, S] int64 and ``past``
    int for the functional one. The output is one tensor: the last hidden state [B, S, hidden], or
    the logits [B, S, vocab].

    Attributes:
        graph_module: the graph; its parameters are the model's own Parameter objects.
        convention: which of the two conventions.
        model: the user's model, unchanged.
        backbone: the module whose forward the graph computes.
        device, dtype: of the model's floating-point parameters; baked into the graph.
        mask_optional: whether None may be given as ``attention_mask``.
        caches: how the original's cache is made; of transformers models only.
        cache_layout, decoder: of hand-written decoders only.
        evidence: JSON-able record of the audit and of the numeric self-check.
    """

    graph_module: fx.GraphModule
    convention: Convention
    model: nn.Module
    backbone: nn.Module
    device: torch.device
    dtype: torch.dtype
    mask_optional: bool = True
    cache_layout: CacheLayout | None = None
    decoder: Decoder | None = None
    caches: CacheKind | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Captured({type(self.model).__name__}, {self.convention}, "
            f"{len(self.graph_module.graph.nodes)} nodes, {self.dtype}, {self.device})"
        )

    @property
    def data_inputs(self) -> list[fx.Node]:
        """The graph inputs that carry tokens."""
        inputs = self.graph_module.graph.find_nodes(op="placeholder")
        return [node for node in inputs if node.target in ("ids", "hidden", *EXTRA_INPUTS)]

    def placeholder(self, name: str) -> fx.Node:
        """The graph input of that name."""
        for node in self.graph_module.graph.find_nodes(op="placeholder"):
            if node.target == name:
                return node
        raise KeyError(name)
