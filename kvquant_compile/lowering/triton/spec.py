"""The static facts that a generated kernel depends on, and which of them are supported."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.formats import Layout
from kvquant_compile.codec.layout import PageLayout, padded


@dataclass(frozen=True)
class KernelSpec:
    """One kernel's format; equal specs share one kernel, whatever their tables.

    Attributes:
        layout: the page layout; the number of heads plays no part.
        rotated: leading groups of eight RoPE pairs that turn; 0 without RoPE.
        columns: query columns (query head of the group, step) of a program, 8 or 16.
        softcap, window: whether the site has them.
        reorder: whether queries have to be brought into pair order.
        warps: pages worked on at a time, one a warp.
    """

    layout: PageLayout
    rotated: int
    columns: int
    softcap: bool
    window: bool
    reorder: bool
    warps: int = 4

    @property
    def pairs(self) -> int:
        """RoPE pairs of a padded key."""
        return padded(self.layout.key_dim) // 2

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
                (f"_recent{s.recent_tokens}", s.recent_tokens),
            )
            if on
        )  # fmt: skip
        return (
            f"history_k{s.key_bits}v{s.value_bits}_d{self.layout.key_dim}x{self.layout.value_dim}"
            f"_rope{self.rotated}_slots{s.key_slots}{s.value_slots}_n{self.columns}{site}"
        )


def table_bias(bits: int) -> int:
    """What is added to table entries to make them unsigned bytes: 7-bit ones at 4 bits."""
    return 64 if bits == 4 else 128


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
