"""What a generated kernel depends on."""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.codec.layout import PageLayout, padded

COLUMN_GROUP = 4
"""Pairs of columns of one matrix product; a query takes one, two or four."""

MOST_NEIGHBOURS = 3
"""Groups of explicit pairs at most whose tokens share rotations, see
:attr:`GluonSpec.neighbours`."""


@dataclass(frozen=True)
class GluonSpec:
    """One kernel's format; equal specs share one kernel, whatever their tables.

    Attributes:
        layout: the page layout; the number of heads plays no part.
        rotates: whether keys turn at all.
        explicit: leading groups of sixteen RoPE pairs whose keys are rotated; the others' rotation
            is a series on the queries' side (see :mod:`.keys`).
        groups: of four pairs of query columns a program, 1 or 2.
        softcap, window: whether the site has them.
        reorder: whether queries have to be brought into pair order.
        stretched: whether any pair has a RoPE scale other than 1.
        dynamic: warps draw pages from a counter instead of taking every n-th one. Faster, but the
            order of sums, and so the last bit of the result, changes from run to run.
        bulk: whether pages come by the copy engine of compute capability 9 and later, or by the
            lanes' own copies (see :mod:`.copies`).
        warps: of a program.
        terms: of the series, 2, 4 or 8: how many columns a query takes. More than 2 with one group.
    """

    layout: PageLayout
    rotates: bool
    explicit: int
    groups: int
    softcap: bool
    window: bool
    reorder: bool
    stretched: bool
    dynamic: bool = True
    bulk: bool = True
    warps: int = 4
    terms: int = 2

    @property
    def key_groups(self) -> int:
        """Groups of sixteen pairs of a key."""
        return padded(self.layout.key_dim) // 32

    @property
    def series(self) -> range:
        """Groups of pairs whose rotation is a series."""
        return range(self.explicit, self.key_groups)

    @property
    def value_groups(self) -> int:
        """Groups of 32 channels of a value."""
        return self.layout.value_dim // 32

    @property
    def pairs(self) -> int:
        """RoPE pairs of a padded key."""
        return 16 * self.key_groups

    @property
    def exact_rows(self) -> str:
        """Rows of a head's exact tokens, in the kernel's words."""
        return f"(SINKS + {self.layout.ring + 1})" if self.layout.ring else "SINKS"

    @property
    def columns(self) -> int:
        """Queries of a program."""
        return COLUMN_GROUP * self.groups // self.span

    @property
    def span(self) -> int:
        """Pairs of columns, and so lanes of a token, that a query takes."""
        return self.terms // 2

    @property
    def neighbours(self) -> bool:
        """Whether a lane's two tokens of a tile, neighbours, share the rotation of explicit keys:
        the second one meets the queries' next column, which is idle and holds them a token back.

        Not with more than three groups of explicit pairs: their tables, larger by half, would take
        the memory of pages."""
        return self.groups == 1 and 0 < self.explicit <= MOST_NEIGHBOURS

    def fragments(self, pairs: int) -> range:
        """Query fragments of a group of sixteen pairs: one for each group of columns, or one for
        all where no series needs columns (see :mod:`.queries`)."""
        series = self.rotates and pairs >= self.explicit
        return range(self.groups if series else 1)

    @property
    def scaled(self) -> bool:
        """Whether keys have a scale of their token."""
        return self.layout.spec.key_token_scale

    @property
    def zero_fragments(self) -> bool:
        """Whether zeros of rotated keys enter by their own product: under a token scale."""
        return self.scaled and self.explicit > 0

    @property
    def name(self) -> str:
        """A readable identifier."""
        s = self.layout.spec
        site = "".join(
            tag
            for tag, on in (
                ("_scaled", s.key_token_scale), ("_cap", self.softcap),
                ("_window", self.window), ("_order", self.reorder),
                ("_stretched", self.stretched), ("_static", not self.dynamic),
                ("_lanes", not self.bulk), (f"_recent{s.recent_tokens}", s.recent_tokens),
                (f"_terms{self.terms}", self.terms > 2),
            )
            if on
        )  # fmt: skip
        rope = f"rope{self.explicit}" if self.rotates else "norope"
        return (
            f"gluon_k{s.key_bits}v{s.value_bits}_d{self.layout.key_dim}x{self.layout.value_dim}"
            f"_{rope}_slots{s.key_slots}{s.value_slots}_n{self.columns}{site}"
        )


def unsupported(layout: PageLayout) -> str:
    """Why no such kernel is generated for a format; empty when one is."""
    s = layout.spec
    if max(s.key_bits, s.value_bits) > 4:
        return f"codes of {max(s.key_bits, s.value_bits)} bits; this back end looks up 1 to 4"
    if padded(layout.key_dim) % 32 or layout.value_dim % 32:
        return f"heads of {layout.key_dim}/{layout.value_dim} channels; it takes multiples of 32"
    if max(layout.key_dim, layout.value_dim) > 256:
        return f"heads of {max(layout.key_dim, layout.value_dim)} channels; it takes up to 256"
    return ""
