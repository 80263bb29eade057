"""Bytes of caches as sympy expressions in the context T and the batch B.

Pages hold 64 tokens of a sequence, so that a cache of T tokens per sequence has ``ceiling(T / 64)``
of them. That is exact for caches which know how long they become, as those of ``generate`` do;
others allocate up to a sixteenth ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from kvquant_compile.codec.formats import Layout
from kvquant_compile.codec.spec import PAGE_TOKENS

CONTEXT, BATCH = sympy.symbols("T B", integer=True, positive=True)
PAGES = sympy.ceiling(CONTEXT / PAGE_TOKENS)
# Of a page of every sequence, beside what layers store: its id, and the positions of its tokens.
_SHARED_PAGE_BYTES = 4 + 4 * PAGE_TOKENS
_LENGTH_BYTES = 4
# generate's own tensors: token ids and mask, int64, and the longer copy that replaces one of them.
_TEXT_BYTES = 3 * 8


@dataclass(frozen=True)
class LayerMemory:
    """One cache layer.

    Attributes:
        index: cache index.
        kind: short name of its page format.
        page_bytes: of 64 tokens of a sequence, all heads.
        exact_bytes: of a sequence's exact tokens, outside the pages.
        original_bytes: of a token of a sequence, keys and values in the model's own dtype.
        tables: calibrated constants.
        weights: parameters of the model's block of that number; 0 where blocks have no numbers.
    """

    index: int
    kind: str
    page_bytes: int
    exact_bytes: int
    original_bytes: int
    tables: int
    weights: int

    @property
    def cache(self) -> sympy.Expr:
        """Bytes of this layer's cache."""
        return BATCH * (self.page_bytes * PAGES + self.exact_bytes)


def layer_cache(layout: Layout) -> tuple[int, int]:
    """(bytes of a page of all heads, bytes of a sequence's exact tokens)."""
    exact = layout.heads * layout.exact_rows * layout.exact_width * layout.itemsize
    return layout.heads * layout.page_bytes, exact


def text() -> sympy.Expr:
    """Bytes of the token ids and masks that ``generate`` keeps."""
    return BATCH * _TEXT_BYTES * CONTEXT


def cache_formula(layers: Sequence[tuple[int, int]], states: int = 0) -> sympy.Expr:
    """Bytes of a whole cache, with the block table, positions and lengths that layers share.

    Args:
        layers: (page bytes, exact bytes) of every layer.
        states: bytes of a sequence's recurrent states.
    """
    pages = sum(page for page, _ in layers)
    exact = sum(row for _, row in layers) + states
    return BATCH * ((pages + _SHARED_PAGE_BYTES) * PAGES + exact + _LENGTH_BYTES)
