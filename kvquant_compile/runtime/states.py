"""What a cache keeps beside keys and values: recurrent states, and indices of tokens.

Both live in a cache as the model itself takes it, of which the keys and values stay empty.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicIndexedLayer, LinearAttentionLayer

from kvquant_compile.capture.kept_positions import ATTRIBUTE
from kvquant_compile.capture.own_cache import own_states
from kvquant_compile.capture.state import put

KEYS, POSITIONS = "index", "positions"
# Where a layer keeps the parts of an index, by the name that files give them.
_PARTS = {KEYS: "indexer_keys", POSITIONS: ATTRIBUTE}


def recurrent_layers(states: Cache | None) -> list[LinearAttentionLayer]:
    """The layers that keep a recurrent state, in order."""
    layers = [] if states is None else states.layers
    return [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]


def indexed_layers(states: Cache | None) -> list[DynamicIndexedLayer]:
    """The layers that keep an index of their tokens (sparse attention), in order."""
    layers = [] if states is None else states.layers
    return [layer for layer in layers if isinstance(layer, DynamicIndexedLayer)]


def index_tensors(layer: DynamicIndexedLayer) -> dict[str, Tensor]:
    """Keys [B, T, D] of an index and positions [1, B, T] of all tokens, where a layer has them."""
    found = {name: getattr(layer, place, None) for name, place in _PARTS.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def restore_index(layer: DynamicIndexedLayer, name: str, tensor: Tensor) -> None:
    """Put back what :func:`index_tensors` named."""
    if name == KEYS:
        layer.update_indexer(tensor)
    else:
        setattr(layer, _PARTS[name], tensor)


def recurrent_bytes(states: Cache | None) -> int:
    """Bytes of all states of a fixed size."""
    return sum(
        tensor.nbytes
        for layer in recurrent_layers(states)
        for tensor in (*layer.conv_states.values(), *layer.recurrent_states.values())
        if tensor is not None
    ) + sum(tensor.nbytes for _, tensor in own_states(states))


def index_bytes(states: Cache | None) -> int:
    """Bytes of all indices."""
    tensors = (t for layer in indexed_layers(states) for t in index_tensors(layer).values())
    return sum(tensor.nbytes for tensor in tensors)


def select_rows(states: Cache | None, rows: Tensor) -> None:
    """Keep the sequences ``rows``, in this order, repeats allowed."""
    layers: list[Any] = [*recurrent_layers(states), *indexed_layers(states)]
    for layer in layers:
        layer.reorder_cache(rows)
    for path, tensor in own_states(states):
        put(states, path, tensor.index_select(0, rows.to(tensor.device)))
