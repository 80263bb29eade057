"""What a quantised cache holds, and how much that is: everything that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicIndexedLayer, LinearAttentionLayer

from kvquant_compile.codec.formats import Layout
from kvquant_compile.runtime import states
from kvquant_compile.runtime.columns import Columns
from kvquant_compile.runtime.layer import QuantizedLayer
from kvquant_compile.runtime.paged import PagedStorage


class CacheContents(Cache):
    """Pages, columns and states of a cache.

    Args:
        layouts: page layout of every cache layer, in order.
        dtype: the model's dtype (exact tokens are kept in it).
        device: where the pages live.
        new_states: makes the cache of layers with a recurrent state, which are kept as they are.

    Attributes:
        columns: cached ones, padding included.
        masks: which of them are padding or hidden.
        states: of layers with a recurrent state or an index; None where a model has none.
    """

    columns: int
    masks: Columns
    states: Cache | None

    def __init__(
        self,
        layouts: Sequence[Layout],
        dtype: torch.dtype,
        device: torch.device,
        new_states: Callable[[], Cache | None],
    ) -> None:
        super().__init__(layers=[QuantizedLayer(layout, self) for layout in layouts])
        self.dtype, self.device, self.new_states = dtype, device, new_states
        self.paged = PagedStorage(self.pages, dtype, device)

    @property
    def pages(self) -> list[QuantizedLayer]:
        """The layers, typed."""
        return cast("list[QuantizedLayer]", self.layers)

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first step."""
        return self.batch or -1

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first step."""
        return self.paged.batch

    @property
    def table(self) -> Tensor:
        """Page of every 64 tokens, int32 [B, n]."""
        return self.paged.table

    @property
    def positions(self) -> Tensor:
        """Position of every stored token, int32 [B, 64 n]; negative where it is hidden."""
        return self.paged.positions

    @property
    def lengths(self) -> Tensor:
        """Tokens stored, int32 [B]."""
        return self.paged.lengths

    @property
    def storage(self) -> object:
        """Another object whenever a tensor of the cache has another address."""
        return self.paged.token

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached columns, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns after the step, offset)."""
        return self.columns + query_length, 0

    def recurrent_layers(self) -> list[LinearAttentionLayer]:
        """The layers that keep a recurrent state, in order."""
        return states.recurrent_layers(self.states)

    def indexed_layers(self) -> list[DynamicIndexedLayer]:
        """The layers that keep an index of their tokens (sparse attention), in order."""
        return states.indexed_layers(self.states)

    def nbytes(self) -> int:
        """Every byte the cache has allocated: pages, exact tokens, block table, positions,
        recurrent states and the keys of indices."""
        kept = states.recurrent_bytes(self.states) + states.index_bytes(self.states)
        return self._paged_bytes() + kept

    def effective_bits(self) -> float:
        """Allocated bits per cached key or value element; recurrent states and indices, which
        stay what they are in the original, are not counted."""
        tokens = int(self.lengths.sum())
        widths = (x.layout.heads * (x.layout.key_dim + x.layout.value_dim) for x in self.pages)
        elements = tokens * sum(widths)
        return 8 * self._paged_bytes() / elements if elements else 0.0

    def _paged_bytes(self) -> int:
        return self.paged.nbytes() + self.masks.nbytes()

    def __repr__(self) -> str:
        kinds = {x.layout.kind for x in self.pages}
        return (
            f"{type(self).__name__}({len(self.layers)} layers {'/'.join(sorted(kinds))}, batch "
            f"{self.batch}, {self.columns} tokens, {self.nbytes():,} bytes)"
        )
