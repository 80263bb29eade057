"""The static facts that a generated C++ kernel depends on, and which of them are supported."""

from __future__ import annotations

from dataclasses import dataclass

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
        s = self.layout.spec
        scaled = "_scaled" if s.key_token_scale else ""
        return (
            f"attend_k{s.key_bits}v{s.value_bits}_d{self.layout.key_dim}x{self.layout.value_dim}"
            f"_rope{4 * self.turning}_slots{s.key_slots}{s.value_slots}{scaled}"
        )

    def constants(self) -> dict[str, int]:
        """Name -> number of every constant that the C++ text refers to."""
        offsets = {name.upper(): start for name, (start, _) in self.layout.offsets.items()}
        return {
            "PAIRS": self.pairs,
            "TURNING_QUADS": self.turning,
            "VALUE_CHANNELS": self.value_channels,
            "KEY_SLOTS": self.layout.spec.key_slots,
            "VALUE_SLOTS": self.layout.spec.value_slots,
            "PAGE_BYTES": self.layout.page_bytes,
            **offsets,
        }

    def index_types(self) -> dict[str, str]:
        """C++ types of the slots' channel indices."""
        dims = {"KeyIndex": self.layout.key_dim, "ValueIndex": self.layout.value_dim}
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
