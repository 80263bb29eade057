"""One layer of the quantised cache: its slabs of pages and its exact leading tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvquant_compile.codec.formats import Layout
from kvquant_compile.errors import CacheError

if TYPE_CHECKING:
    from kvquant_compile.runtime.cache import QuantizedCache


class QuantizedLayer(CacheLayerMixin):
    """One layer's pages. Reading and writing happens in the ops, not through ``update``."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, layout: Layout, owner: QuantizedCache) -> None:
        super().__init__()
        self.layout, self.owner = layout, owner
        self.slabs: list[Tensor] = []
        self.sinks: Tensor = torch.empty(0)

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

    def allocate(self, batch: int, pages: int, device: torch.device, dtype: torch.dtype) -> None:
        """Add a slab of ``pages`` zeroed pages, and the sinks with the first."""
        layout = self.layout
        if not self.slabs:
            shape = (batch, layout.heads, layout.exact_rows, layout.exact_width)
            self.sinks = torch.zeros(shape, dtype=dtype, device=device)
        # Zeros, not garbage: a NaN in an unused slot would survive its zero softmax weight.
        shape_pages = (pages, layout.heads, layout.page_bytes)
        self.slabs.append(torch.zeros(shape_pages, dtype=torch.uint8, device=device))

    def select(self, ids: Tensor, rows: Tensor) -> None:
        """Keep copies of the pages ``ids`` and of the rows' sinks, in this order; in place where
        their number stays."""
        stacked = self.slabs[0] if len(self.slabs) == 1 else torch.cat(self.slabs)
        chosen, sinks = stacked.index_select(0, ids), self.sinks.index_select(0, rows)
        if chosen.shape != stacked.shape:
            self.slabs, self.sinks = [chosen], sinks
            return
        del stacked  # before anything else is allocated: it may be a copy of all pages
        for slab, part in zip(
            self.slabs, chosen.split([len(slab) for slab in self.slabs]), strict=True
        ):
            slab.copy_(part)
        self.sinks.copy_(sinks)

    def nbytes(self) -> int:
        """Allocated bytes of this layer."""
        return sum(slab.nbytes for slab in self.slabs) + self.sinks.nbytes
