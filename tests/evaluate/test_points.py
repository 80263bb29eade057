"""Recipes and widths as they are spelled, and the front of what was scored."""

from __future__ import annotations

import pytest

from kvquant_compile.config import FormatOptions
from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate.pareto import front
from kvquant_compile.evaluate.points import Point, grid_points, parse_points
from kvquant_compile.evaluate.score import Score
from kvquant_compile.evaluate.table import Row
from kvquant_compile.mixed.request import MixedBits


def test_lists_are_multiplied_out_once_each() -> None:
    points = parse_points("kvquant+, kivi,fp8,kvquant-released,bf16", "3,2.5, 4/2,3")
    assert [p.name for p in points] == [
        "kvquant+ 3", "kvquant+ 2.5", "kvquant+ 4/2", "kivi 3", "kivi 2.5", "kivi 4/2", "fp8",
        "kvquant-released 3", "bf16",
    ]  # fmt: skip
    assert [p.nominal for p in points] == [3, 2.5, 3, 3, 2.5, 3, 8, 3, 16]


def test_spellings_become_formats() -> None:
    assert Point("kvquant+", "4/2").choice()[0].form.bits == (4, 2)
    assert Point("kvquant+", "2.5").choice()[1] == MixedBits(mean=2.5)
    assert Point("kivi", "auto:2.9").choice()[1] == MixedBits(effective_bits=2.9)
    assert Point("fp8").choice()[0].fixed
    assert Point("kvquant+", "3").choice()[1] is None
    assert Point("kvquant+@0", "2.5").choice()[0].form.slots == 0
    exact = Point("kvquant+@1/0r32", "2").choice()[0].form
    assert (exact.slot_pair, exact.recent_window) == ((1, 0), 32)
    only_recent = Point("kvquant+@r48", "2").choice()[0].form
    assert (only_recent.slots, only_recent.recent_window) == (FormatOptions().slots, 48)
    assert Point("kvquant", "2").choice()[0].form.slots == 2


@pytest.mark.parametrize(
    ("recipes", "bits", "match"),
    [
        ("best", "3", "'best'"),
        ("kivi@0", "3", "'kivi@0'"),
        ("kvquant+@", "3", "@0 has no"),
        ("kvquant+@0r", "3", "@0r16"),
        ("kvquant+@1/", "3", "@0r16"),
        ("kvquant+", "x", "--bits x"),
        ("kvquant+", "3/2.5", "--bits"),
        ("kvquant+", "3/2/1", "--bits"),
        ("kvquant+", "auto:", "--bits"),
        ("kvquant+", "auto:99", "budget"),
        ("kvquant+", "9", "bits=9"),
    ],
)
def test_refusals(recipes: str, bits: str, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        parse_points(recipes, bits)


def test_a_grid_has_every_pair_by_its_plain_name() -> None:
    assert [p.bits for p in grid_points("kivi", [2, 3])] == ["2", "2/3", "3/2", "3"]


def row(name: str, bits: float, kl: float) -> Row:
    return Row(name, 3, bits, None, Score(1.0, kl, 1.0, 1, 1), 0.0)


def test_the_front_holds_what_nothing_beats() -> None:
    rows = [row("original", 1, 0), row("a", 4, 0.1), row("b", 2, 0.3), row("c", 4, 0.2),
            row("d", 3, 0.3), row("e", 3, 0.2), row("f", 8, 0.1)]  # fmt: skip
    assert [r.name for r in front(rows)] == ["b", "e", "a"]
