"""What a generated kernel depends on, and where things lie in its shared memory."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import PAGE_TOKENS

COLUMN_GROUP = 4
"""Pairs of columns of one matrix product; a query takes one, two or four."""

MOST_TERMS = 2 * COLUMN_GROUP

MOST_NEIGHBOURS = 3
"""Groups of explicit pairs at most whose tokens share rotations, see
:attr:`GluonSpec.neighbours`."""

EXPLICIT_EXPONENT = 9
"""Explicitly rotated keys are 2**9 times smaller, their queries larger, to stay normal halves."""

SERIES_LIMITS = {2: 0.05, 4: 0.7, 8: 3.21}
"""Number of terms -> the largest angle, in radians over half a page, that so many terms of a
rotation's series reach: to 6e-4, 1.3e-3 and 1.6e-3 at the far ends of a page."""


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


@dataclass(frozen=True)
class Memory:
    """Bytes of a program's shared memory, all offsets from its start."""

    spec: GluonSpec

    @staticmethod
    def bound(layout: PageLayout) -> int:
        """Most bytes of any kernel for a format, whatever its rotations and queries."""
        rotations = range(padded(layout.key_dim) // 32 + 1)
        uses = ((2, 2), *((1, terms) for terms in SERIES_LIMITS))
        return max(
            Memory(GluonSpec(layout, True, n, groups, True, True, True, True, terms=terms)).size
            for n, (groups, terms) in itertools.product(rotations, uses)
        )

    @functools.cached_property
    def key_bytes(self) -> int:
        """Leading bytes of a page that belong to its keys."""
        return self.spec.layout.offsets["value_codes"][0]

    @functools.cached_property
    def positions(self) -> int:
        """A page's positions, behind the page."""
        return self.spec.layout.page_bytes

    @functools.cached_property
    def stage(self) -> int:
        """One warp's page with its positions; at the end, its sums."""
        sums = self.spec.groups * (512 * self.spec.value_groups + 64)
        return _up(max(self.positions + 4 * PAGE_TOKENS, sums), 128)

    @functools.cached_property
    def queries(self) -> int:
        """Query fragments, which every page turns anew: [group of pairs, group][lane][16 B]; behind
        them the partners of those of series."""
        return self.spec.warps * self.stage

    def query(self, pairs: int, fragment: int) -> int:
        """A fragment's words."""
        return self.queries + 512 * (pairs * self.spec.groups + fragment)

    @property
    def partner(self) -> int:
        """How far behind a fragment of a series its partner is."""
        return 512 * len(self.spec.series) * self.spec.groups

    @functools.cached_property
    def angles(self) -> int:
        """Cosines and sines of a page's base, a warp: [group of pairs][t][cos cos sin sin]."""
        if not self.spec.rotates:
            return self.queries
        return self.query(self.spec.key_groups, 0) + self.partner

    @property
    def angle_bytes(self) -> int:
        """Of one warp."""
        return 64 * self.spec.key_groups if self.spec.rotates else 0

    @functools.cached_property
    def constants(self) -> int:
        """The head's constants; sections as in :class:`Constants`."""
        return self.angles + self.spec.warps * self.angle_bytes

    @functools.cached_property
    def key_slots(self) -> int:
        """Queries by pair and head, for outlier slots: [pair][4 heads][a, b]."""
        return _up(self.constants + Constants(self.spec).size, 128)

    @property
    def key_slot_bytes(self) -> int:
        """Of one group."""
        return 16 * self.spec.pairs if self.spec.layout.spec.key_slots else 0

    @functools.cached_property
    def value_slots(self) -> int:
        """Fixed-point sums of value outliers, a warp: [channel][4 heads] int32."""
        return self.key_slots + self.spec.groups * self.key_slot_bytes

    @property
    def value_slot_bytes(self) -> int:
        """Of one warp and group."""
        return 16 * self.spec.layout.value_dim if self.spec.layout.spec.value_slots else 0

    @functools.cached_property
    def barriers(self) -> int:
        """mbarriers of bulk copies: two a warp (keys, values), one for the constants; 8 bytes."""
        return self.value_slots + self.spec.warps * self.spec.groups * self.value_slot_bytes

    @functools.cached_property
    def size(self) -> int:
        """All of it."""
        return self.barriers + (16 * self.spec.warps + 16 if self.spec.bulk else 0)


@dataclass(frozen=True)
class Constants:
    """Sections of a head's constants, offsets from their start; made by :mod:`.constants`."""

    spec: GluonSpec

    @property
    def rotation(self) -> int:
        """[chunk, tile, explicit group][vector][lane][16 B]; vectors as in :mod:`.explicit`."""
        return 0

    @property
    def rotation_bytes(self) -> int:
        """Of a tile's group."""
        return 512 * (3 if self.spec.neighbours else 2)

    @property
    def zeros(self) -> int:
        """Rotated zeros: [chunk, tile, explicit group][member][lane][16 B], or with both tiles in
        one vector where tokens share rotations."""
        return 4 * self.spec.explicit * self.rotation_bytes

    @property
    def turns(self) -> int:
        """[word of an angle][16 B]: frequencies of its two pairs."""
        size = 1024 * (2 if self.spec.neighbours else 4) * self.spec.explicit
        return self.zeros + (size if self.spec.zero_fragments else 0)

    @property
    def scales(self) -> int:
        """[group of pairs][3][t][16 B]: scales and zeros."""
        return self.turns + (128 * self.spec.key_groups if self.spec.rotates else 0)

    @property
    def tables(self) -> int:
        """Key table, value table: 16 bytes each, four times.

        The compiler must not see that all lanes read the same: it would keep tables in uniform
        registers, and copy them for every lookup.
        """
        return self.scales + 192 * self.spec.key_groups

    @property
    def polynomials(self) -> int:
        """[lane of a query][g][token of the lane][even, odd] float32: what the lane's two terms are
        to be multiplied by, where there are more than two."""
        return self.tables + 128

    @property
    def outliers(self) -> int:
        """[channel][frequency (two words), phase, factor], where keys have slots."""
        return self.polynomials + (512 * self.spec.span if self.spec.terms > 2 else 0)

    @property
    def size(self) -> int:
        """All of it."""
        slots = self.spec.layout.spec.key_slots
        return self.outliers + (32 * self.spec.pairs if slots else 0)


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
