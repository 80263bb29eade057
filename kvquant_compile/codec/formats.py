"""The two kinds of page layout, and reading either from the format string of a graph."""

from __future__ import annotations

import functools

from kvquant_compile.codec.algebra.layout import PREFIX, BlockLayout
from kvquant_compile.codec.algebra.recipe import Recipe, RecipeTables
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec, LayerTables

Layout = PageLayout | BlockLayout
Format = CodecSpec | Recipe
Tables = LayerTables | RecipeTables


@functools.lru_cache(maxsize=256)
def parse_layout(text: str) -> Layout:
    """Inverse of ``str`` of a layout.

    Raises:
        ValueError: the text is no format.
        OptionError: a recipe's block is not there.
    """
    return BlockLayout.parse(text) if text.startswith(PREFIX) else PageLayout.parse(text)


def page_layout(spec: Format, heads: int, key_dim: int, value_dim: int, itemsize: int) -> Layout:
    """The pages of a format for a layer of so many kv heads and channels; ``itemsize`` is of the
    model's dtype."""
    kind = BlockLayout if isinstance(spec, Recipe) else PageLayout
    return kind(spec, heads, key_dim, value_dim, itemsize)  # type: ignore[arg-type]
