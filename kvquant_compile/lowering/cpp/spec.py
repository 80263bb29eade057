"""The static facts that a generated C++ kernel depends on, and which of them are supported."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.formats import Layout
from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.slots import index_dtype


@dataclass(frozen=True)
class CppSpec:
    """One kernel's format; equal specs share one kernel, whatever their tables.

    Attributes:
        layout: the page layout, for one head: the number of heads plays no part.
        turning: leading groups of four RoPE pairs that turn; 0 without RoPE.
    """

    layout: PageLayout
    turning: int

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
        return f"attend_{format_name(self.layout)}_rope{4 * self.turning}"

    def constants(self) -> dict[str, int]:
        """Name -> number of every constant that the C++ text refers to."""
        return {"TURNING_QUADS": self.turning, **page_constants(self.layout)}


def static_layout(layout: PageLayout) -> PageLayout:
    """What a kernel depends on: neither the number of heads, nor the model's dtype, nor how many
    last tokens are exact."""
    return replace(layout, spec=replace(layout.spec, recent_tokens=0), heads=1, itemsize=0)


EXACT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""``ExactType`` of ``exact.h``."""


def format_name(layout: PageLayout) -> str:
    """A readable identifier of a page format."""
    s = layout.spec
    scaled = "_scaled" if s.key_token_scale else ""
    return (
        f"k{s.key_bits}v{s.value_bits}_d{layout.key_dim}x{layout.value_dim}"
        f"_slots{s.key_slots}{s.value_slots}{scaled}"
    )


def page_constants(layout: PageLayout) -> dict[str, int]:
    """Name -> number of what C++ has to know of a page."""
    spec = layout.spec
    offsets = {name.upper(): start for name, (start, _) in layout.offsets.items()}
    return {
        "KEY_DIM": padded(layout.key_dim),
        "PAIRS": padded(layout.key_dim) // 2,
        "VALUE_DIM": layout.value_dim,
        "VALUE_CHANNELS": padded(layout.value_dim),
        "KEY_BITS": spec.key_bits,
        "VALUE_BITS": spec.value_bits,
        "KEY_SLOTS": spec.key_slots,
        "VALUE_SLOTS": spec.value_slots,
        "TOKEN_SCALE": int(spec.key_token_scale),
        "PAGE_BYTES": layout.page_bytes,
        **offsets,
    }


def index_types(layout: PageLayout) -> dict[str, str]:
    """C++ types of the slots' channel indices."""
    dims = {"KeyIndex": layout.key_dim, "ValueIndex": layout.value_dim}
    return {
        name: "uint8_t" if index_dtype(dim).itemsize == 1 else "int16_t"
        for name, dim in dims.items()
    }


def unsupported(layout: Layout) -> str:
    """Why no C++ is generated for a format; empty when it is."""
    if isinstance(layout, BlockLayout):
        return f"recipe {layout.recipe.name} is read by the torch path"
    if layout.lossless:
        return "lossless pages are read by the torch path"
    return ""
