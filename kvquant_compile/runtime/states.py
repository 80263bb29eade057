"""What a cache keeps beside keys and values: recurrent states, and indices of tokens.

Both live in a cache as the model itself takes it, of which the keys and values stay empty.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicIndexedLayer, LinearAttentionLayer

from kvquant_compile.capture.own_cache import own_states
from kvquant_compile.capture.state import put


def recurrent_layers(states: Cache | None) -> list[LinearAttentionLayer]:
    """The layers that keep a recurrent state, in order."""
    layers = [] if states is None else states.layers
    return [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]


def indexed_layers(states: Cache | None) -> list[DynamicIndexedLayer]:
    """The layers that keep an index of their tokens (sparse attention), in order."""
    layers = [] if states is None else states.layers
    return [layer for layer in layers if isinstance(layer, DynamicIndexedLayer)]


def recurrent_bytes(states: Cache | None) -> int:
    """Bytes of all recurrent states, and of what is kept beside keys, values and indices."""
    return sum(
        tensor.nbytes
        for layer in recurrent_layers(states)
        for tensor in (*layer.conv_states.values(), *layer.recurrent_states.values())
        if tensor is not None
    ) + sum(tensor.nbytes for _, tensor in own_states(states))


def index_bytes(states: Cache | None) -> int:
    """Bytes of all indices."""
    keys = (layer.indexer_keys for layer in indexed_layers(states))
    return sum(tensor.nbytes for tensor in keys if tensor is not None)


def select_rows(states: Cache | None, rows: Tensor) -> None:
    """Keep the sequences ``rows``, in this order, repeats allowed."""
    layers: list[Any] = [*recurrent_layers(states), *indexed_layers(states)]
    for layer in layers:
        layer.reorder_cache(rows)
    for path, tensor in own_states(states):
        put(states, path, tensor.index_select(0, rows.to(tensor.device)))
