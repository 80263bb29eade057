"""The bytes of a page under a recipe: whole units of tokens, keys first, then values.

A page holds 64 tokens of one kv head. A unit (``codec.tokens`` tokens) takes whole bytes, so that
units are written without touching their neighbours. Exact tokens lie outside the pages, in rows
of keys and values in the model's dtype and channel order: first the sinks, then, where the
recipe leaves a tail, a ring of as many rows as the tail can have tokens (token n in row
``n % ring``), then a row of which only the first eight bytes are used: what the ring holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from kvquant_compile.codec.algebra.base import Codec, Constants
from kvquant_compile.codec.algebra.recipe import Recipe
from kvquant_compile.codec.spec import PAGE_TOKENS

PREFIX = "recipe "


@dataclass(frozen=True)
class Section:
    """Keys or values of a page.

    Attributes:
        codec: what codes them.
        dim: channels.
        start: first byte.
        unit_bytes: bytes of ``codec.tokens`` tokens.
    """

    codec: Codec
    dim: int
    start: int
    unit_bytes: int

    @property
    def units(self) -> int:
        """Units of a page."""
        return PAGE_TOKENS // self.codec.tokens

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.start + self.units * self.unit_bytes

    def view(self, pages: Tensor) -> Tensor:
        """The units of pages uint8 [..., page_bytes], [..., units, unit_bytes]; shares memory."""
        return pages[..., self.start : self.end].unflatten(-1, (self.units, self.unit_bytes))

    def read(self, pages: Tensor, constants: Constants) -> Tensor:
        """Tokens float32 [B, H, 64 n, dim] of pages uint8 [B, H, n, page_bytes]."""
        units = self.view(pages).flatten(2, 3)
        return self.codec.decode_bytes(units, constants, self.codec.tokens, self.dim).flatten(2, 3)


@dataclass(frozen=True)
class BlockLayout:
    """The static byte layout of one layer's pages under a recipe.

    Attributes:
        recipe: the format.
        heads: kv heads.
        key_dim, value_dim: channels per head.
        itemsize: bytes of an element of the model's dtype.
    """

    recipe: Recipe
    heads: int
    key_dim: int
    value_dim: int
    itemsize: int

    def __str__(self) -> str:
        """The format string that the ops of a rewritten graph carry."""
        return (
            f"{PREFIX}{self.recipe} heads{self.heads} dim{self.key_dim}/{self.value_dim} "
            f"raw{self.itemsize}"
        )

    @staticmethod
    def parse(text: str) -> BlockLayout:
        """Inverse of ``str``; raises ValueError on anything else."""
        try:
            recipe, heads, dims, raw = text.removeprefix(PREFIX).rsplit(" ", 3)
            key, value = dims.removeprefix("dim").split("/")
            numbers = (int(heads.removeprefix("heads")), int(key), int(value))
            return BlockLayout(Recipe.parse(recipe), *numbers, int(raw.removeprefix("raw")))
        except ValueError as error:
            raise ValueError(f"not a page format: {text!r}") from error

    @property
    def kind(self) -> str:
        """A short name."""
        return self.recipe.name

    @functools.cached_property
    def sections(self) -> tuple[Section, Section]:
        """Keys and values."""
        keys, values = self.recipe.keys, self.recipe.values
        first = Section(keys, self.key_dim, 0, keys.unit_bytes(keys.tokens, self.key_dim))
        size = values.unit_bytes(values.tokens, self.value_dim)
        return first, Section(values, self.value_dim, first.end, size)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one head."""
        return self.sections[1].end

    @property
    def sink_tokens(self) -> int:
        """Exact leading tokens."""
        return self.recipe.sinks

    @property
    def ring(self) -> int:
        """Rows for the exact last tokens."""
        return max(tail.most(codec.tokens) for _, codec, tail in self.recipe.kinds())

    @property
    def late(self) -> int:
        """Last tokens that reach the pages later: those of the ring."""
        return self.ring

    @property
    def exact_rows(self) -> int:
        """Rows of the exact tokens of one sequence."""
        return self.recipe.sinks + (self.ring + 1 if self.ring else 0)

    @property
    def exact_width(self) -> int:
        """Elements of a row."""
        return self.key_dim + self.value_dim

    @property
    def lossless(self) -> bool:
        """False: pages hold codes."""
        return False

    @property
    def effective_bits(self) -> float:
        """Bits of a full page over its elements; exact tokens apart."""
        return 8 * self.page_bytes / (PAGE_TOKENS * (self.key_dim + self.value_dim))
