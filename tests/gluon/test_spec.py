"""Where things lie in shared memory and in a head's constants, and what formats are taken."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import PAGE_TOKENS, CodecSpec
from kvquant_compile.lowering.gluon.memory import Constants, Memory
from kvquant_compile.lowering.gluon.spec import GluonSpec, unsupported

CODECS = (
    CodecSpec(3, 3, 0, 0, False, 0), CodecSpec(3, 3, 1, 1, True, 1), CodecSpec(4, 2, 4, 0, True, 2),
    CodecSpec(1, 1, 0, 3, False, 0), CodecSpec(2, 4, 2, 2, False, 1),
)  # fmt: skip
WIDTHS = ((32, 32), (64, 128), (96, 64), (128, 128), (256, 256))
TURNS = (
    (-1, 1, 2), (-1, 2, 2), (0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2), (1, 1, 8), (3, 1, 2),
    (4, 1, 4),
)  # fmt: skip
"""Groups of explicit pairs (none rotates at -1), groups of columns, terms."""

SPECS = [
    GluonSpec(PageLayout(codec, 2, *dims, 2), explicit >= 0, max(explicit, 0), groups,
              False, False, False, False, terms=terms)
    for codec, dims, (explicit, groups, terms) in itertools.product(CODECS, WIDTHS, TURNS)
    if explicit <= padded(dims[0]) // 32
]  # fmt: skip


def sections(spec: GluonSpec) -> list[tuple[str, int, int]]:
    """Name, start and end of everything in a program's shared memory."""
    m, warps, groups = Memory(spec), range(spec.warps), range(spec.groups)
    found = [(f"stage {w}", w * m.stage, (w + 1) * m.stage) for w in warps]
    if spec.rotates:
        size = 512 * spec.groups
        found.append(("queries", m.queries, m.queries + size * spec.key_groups))
        partners = m.query(spec.explicit, 0) + m.partner
        found.append(("partners", partners, partners + size * len(spec.series)))
    found += [(f"angles {w}", m.angles + w * m.angle_bytes, m.angles + (w + 1) * m.angle_bytes)
              for w in warps]  # fmt: skip
    found.append(("constants", m.constants, m.constants + Constants(spec).size))
    found += [(f"key slots {g}", m.key_slots + g * m.key_slot_bytes,
               m.key_slots + (g + 1) * m.key_slot_bytes) for g in groups]  # fmt: skip
    each = m.value_slot_bytes
    found += [(f"value slots {n}", m.value_slots + n * each, m.value_slots + (n + 1) * each)
              for n in range(spec.warps * spec.groups)]  # fmt: skip
    found.append(("barriers", m.barriers, m.barriers + 16 * spec.warps + 8))
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_sections_are_aligned_and_apart(spec: GluonSpec) -> None:
    found = sections(spec)
    assert [name for name, start, _ in found if start % 16] == []
    ordered = sorted((s for s in found if s[1] < s[2]), key=lambda s: s[1])
    assert [(a[0], b[0]) for a, b in itertools.pairwise(ordered) if a[2] > b[1]] == []
    assert ordered[-1][2] <= Memory(spec).size


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_a_stage_holds_a_page_or_the_sums(spec: GluonSpec) -> None:
    m = Memory(spec)
    assert m.stage >= spec.layout.page_bytes + 4 * PAGE_TOKENS
    vectors = spec.groups * spec.value_groups
    assert m.stage >= 512 * vectors + 64 * spec.groups, "four sums a lane, four words of state"
    assert m.key_bytes % 16 == m.positions % 16 == 0, "bulk copies begin and end at 16 bytes"
    assert (spec.layout.page_bytes - m.key_bytes) % 16 == 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_constants_are_in_order(spec: GluonSpec) -> None:
    c = Constants(spec)
    places = [c.rotation, c.zeros, c.turns, c.scales, c.tables, c.polynomials, c.outliers, c.size]
    assert places == sorted(places)
    assert [place for place in places if place % 16] == []
    assert (c.size > c.outliers) == (spec.layout.spec.key_slots > 0)
    assert (c.turns > c.zeros) == spec.zero_fragments
    assert (c.scales > c.turns) == spec.rotates


def test_names_tell_specs_apart() -> None:
    spec = SPECS[2]
    others = [replace(spec, softcap=True), replace(spec, window=True), replace(spec, reorder=True),
              replace(spec, stretched=True), replace(spec, dynamic=False)]  # fmt: skip
    names = {s.name for s in [*SPECS, *others]}
    assert len(names) == len({*SPECS, *others})
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize(
    ("codec", "dims", "reason"),
    [
        (CodecSpec(5, 3), (128, 128), "5 bits"),
        (CodecSpec(3, 8), (128, 128), "8 bits"),
        (CodecSpec(3, 3), (80, 80), "multiples of 32"),
        (CodecSpec(3, 3), (128, 80), "multiples of 32"),
        (CodecSpec(3, 3), (512, 128), "512 channels"),
        (CodecSpec(4, 1), (256, 64), ""),
    ],
)
def test_formats_that_are_not_generated_say_why(
    codec: CodecSpec, dims: tuple[int, int], reason: str
) -> None:
    said = unsupported(PageLayout(codec, 2, *dims, 2))
    assert reason in said
    assert bool(reason) == bool(said)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_no_kernel_of_a_format_needs_more_than_the_bound(spec: GluonSpec) -> None:
    assert Memory(spec).size <= Memory.bound(spec.layout)
