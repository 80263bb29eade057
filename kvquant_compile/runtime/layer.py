"""One layer of the quantised cache: its slabs of pages and its exact leading tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvquant_compile.codec.formats import Layout
from kvquant_compile.errors import CacheError

if TYPE_CHECKING:
    from kvquant_compile.runtime.contents import CacheContents


class QuantizedLayer(CacheLayerMixin):
    """One layer's pages. Reading and writing happens in the ops, not through ``update``."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, layout: Layout, owner: CacheContents) -> None:
        super().__init__()
        self.layout, self.owner = layout, owner
        self.slabs: list[Tensor] = []
        self.sinks: Tensor = torch.empty(0)

    def __repr__(self) -> str:
        return f"QuantizedLayer({self.layout}, {len(self.slabs)} slabs, {self.nbytes():,} bytes)"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage comes with the first step."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Refused: full-precision keys and values never exist.

        Raises:
            CacheError: always.
        """
        raise CacheError(
            "a quantised cache cannot be updated with full-precision keys and values",
            why="it is filled by the rewritten graph only, which hands it keys before RoPE",
            do="Pass it to the optimised model, or use transformers' DynamicCache with another.",
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns after the step, offset)."""
        return self.owner.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Cached columns, padding included."""
        return self.owner.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def refuse(self, *args: object, **kwargs: object) -> NoReturn:
        """What stands in for everything that would change one layer.

        Raises:
            CacheError: always.
        """
        raise CacheError(
            "one layer of a quantised cache cannot be changed on its own",
            why="all layers share one block table, and none is kept on another device",
            do="Call the method of the cache.",
        )

    reset = reorder_cache = crop = offload = prefetch = refuse
    batch_repeat_interleave = batch_select_indices = refuse

    def new_slab(self, pages: int, device: torch.device) -> Tensor:
        """A slab of so many zeroed pages, uint8 [pages, heads, page_bytes]."""
        # Zeros, not garbage: a NaN in an unused slot would survive its zero softmax weight.
        shape = (pages, self.layout.heads, self.layout.page_bytes)
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def new_sinks(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Zeroed exact tokens [batch, heads, rows, width]."""
        layout = self.layout
        shape = (batch, layout.heads, layout.exact_rows, layout.exact_width)
        return torch.zeros(shape, dtype=dtype, device=device)

    def nbytes(self) -> int:
        """Allocated bytes of this layer."""
        return sum(slab.nbytes for slab in self.slabs) + self.sinks.nbytes
