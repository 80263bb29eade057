"""Other codecs through the same captured graph, by quantising and dequantising on the spot.

Nothing is stored: keys and values are replaced by what the codec would give back, at the same
places of the graph where ours reads its pages. This is how baselines are scored on equal terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, fx

from kvquant_compile.calib.observe import run_captured
from kvquant_compile.capture.captured import Captured
from kvquant_compile.evaluate.stored import KEYS, VALUES
from kvquant_compile.passes.head_view import HeadView
from kvquant_compile.passes.recognise import MatchedLayer


class FakeCodec(Protocol):
    """A codec as a map from tensors to the tensors it would give back."""

    @property
    def pre_rope(self) -> bool:
        """Whether keys are taken before RoPE."""

    def keys(self, x: Tensor, layer: int) -> Tensor:
        """Keys [B, H, S, D] as read back; before RoPE if ``pre_rope``."""

    def values(self, x: Tensor, layer: int) -> Tensor:
        """Values [B, H, S, D] as read back."""

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        """Stored bits per element, scales and indices included."""


def fake_logits(
    captured: Captured, layers: Sequence[MatchedLayer], codec: FakeCodec
) -> Callable[[Tensor], Tensor]:
    """ids [1, S] -> logits [1, S, vocab] with every key and value passed through the codec."""
    gm, _ = insert_codec(captured.graph_module, layers, codec)

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return run_captured(captured, gm, ids.to(captured.device))

    return logits


def insert_codec(
    source: fx.GraphModule, layers: Sequence[MatchedLayer], codec: FakeCodec
) -> tuple[fx.GraphModule, dict[fx.Node, tuple[int, str]]]:
    """A copy of a captured graph with the codec's round trip at every append, and the nodes of
    these with the layer's cache index and "keys" or "values"."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    trips: dict[fx.Node, tuple[int, str]] = {}
    graph.output(graph.graph_copy(source.graph, copies))
    for layer in layers:
        before_rope = codec.pre_rope and layer.plan.rope is not None
        index = layer.plan.index
        key = HeadView.of(layer.key_pre if before_rope else layer.key)
        new = _wrap(graph, copies[key.node], _round_trip(codec.keys, key), index)
        trips[new] = (index, KEYS)
        value = HeadView.of(layer.value)
        new = _wrap(graph, copies[value.node], _round_trip(codec.values, value), index)
        trips[new] = (index, VALUES)
    return fx.GraphModule(source, graph), trips


def _wrap(graph: fx.Graph, node: fx.Node, trip: Callable[..., Tensor], layer: int) -> fx.Node:
    with graph.inserting_after(node):
        new = graph.call_function(trip, (node, layer))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def _round_trip(
    codec: Callable[[Tensor, int], Tensor], view: HeadView
) -> Callable[[Tensor, int], Tensor]:
    def round_trip(x: Tensor, layer: int) -> Tensor:
        return view.undo(codec(view(x), layer).to(x.dtype))

    return round_trip
