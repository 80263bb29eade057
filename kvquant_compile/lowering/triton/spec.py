"""The static facts that a generated kernel depends on, and which of them are supported."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.formats import Layout
from kvquant_compile.codec.layout import PageLayout, padded

TERMS = 2
"""Columns of a product that a query takes."""


@dataclass(frozen=True)
class KernelSpec:
    """One kernel's format; equal specs share one kernel, whatever their tables.

    Attributes:
        layout: the page layout; the number of heads plays no part.
        rotated: leading groups of eight RoPE pairs that turn; 0 without RoPE.
        explicit: leading groups of sixteen pairs whose keys are made and turned before products;
            the others' rotation is a series (see :mod:`.keys`). All of them with key slots.
        queries: (query head of the group, step) of a program, 4 or 8.
        softcap, window: whether the site has them.
        reorder: whether queries have to be brought into pair order.
        stretched: whether any pair has a RoPE scale other than 1.
        warps: pages worked on at a time, one a warp.
    """

    layout: PageLayout
    rotated: int
    explicit: int
    queries: int
    softcap: bool
    window: bool
    reorder: bool
    stretched: bool
    warps: int = 4

    @property
    def columns(self) -> int:
        """Columns of a matrix product."""
        return TERMS * self.queries

    @property
    def octets(self) -> int:
        """Groups of eight pairs; two of them share a matrix slice pair, an odd last one a slice."""
        return self.pairs // 8

    @property
    def groups(self) -> int:
        """Groups of sixteen pairs, the last of them perhaps of eight."""
        return -(-self.octets // 2)

    def octets_of(self, group: int) -> range:
        """The octets of a group: two or one."""
        return range(2 * group, min(2 * group + 2, self.octets))

    def turns(self, group: int) -> bool:
        """Whether any pair of a group turns."""
        return 2 * group < self.rotated

    @property
    def affine(self) -> bool:
        """Whether tables of explicit keys contain scales and zeros: but for key slots, which lie
        between scaling and turning."""
        return self.layout.spec.key_slots == 0

    @property
    def scaled(self) -> bool:
        """Whether keys have a scale of their token."""
        return self.layout.spec.key_token_scale

    @property
    def pairs(self) -> int:
        """RoPE pairs of a padded key."""
        return padded(self.layout.key_dim) // 2

    @property
    def zero_fragments(self) -> bool:
        """Whether zeros of explicit keys enter by their own product: under a token scale."""
        return self.scaled and self.affine and self.explicit > 0

    @property
    def value_channels(self) -> int:
        """Channels of a padded value."""
        return padded(self.layout.value_dim)

    @property
    def name(self) -> str:
        """A readable identifier."""
        s = self.layout.spec
        site = "".join(
            tag
            for tag, on in (
                ("_scaled", s.key_token_scale), ("_cap", self.softcap),
                ("_window", self.window), ("_order", self.reorder),
                ("_stretched", self.stretched),
                (f"_recent{s.recent_tokens}", s.recent_tokens),
            )
            if on
        )  # fmt: skip
        return (
            f"history_k{s.key_bits}v{s.value_bits}_d{self.layout.key_dim}x{self.layout.value_dim}"
            f"_rope{self.rotated}_{self.explicit}_slots{s.key_slots}{s.value_slots}"
            f"_n{self.queries}{site}"
        )


def table_bias(bits: int) -> int:
    """What is added to table entries to make them unsigned bytes: 7-bit ones at 4 bits."""
    return 64 if bits == 4 else 128


def table_row(bits: int) -> int:
    """Bytes of a head's table."""
    return max(2**bits, 64)


def value_bias(bits: int) -> int:
    """What is added to value table entries to make them signed bytes with a permute's sign mode to
    spare: 7-bit ones at 4 bits, where two permutes are combined."""
    return table_bias(bits) if bits == 4 else 0


def unsupported(layout: Layout) -> str:
    """Why no kernel is generated for a format; empty when one is."""
    if isinstance(layout, BlockLayout):
        return f"recipe {layout.recipe.name} is read by the torch path"
    if layout.lossless:
        return "lossless pages are read by the torch path"
    if layout.ring and layout.exact_width * layout.itemsize % 4:
        return f"exact recent tokens of {layout.exact_width} channels, keys and values together"
    widest = max(layout.key_dim, layout.value_dim)
    if widest > 256:
        return f"{widest} channels a head; kernels are generated up to 256"
    return ""
