"""Where things lie in a program's shared memory."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.series import SERIES_LIMITS


@dataclass(frozen=True)
class Memory:
    """Bytes of a program's shared memory, all offsets from its start."""

    spec: GluonSpec

    @staticmethod
    @functools.lru_cache(maxsize=256)  # asked for by every eager step, layer by layer
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
