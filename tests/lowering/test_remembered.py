"""Values live and die with the tensors they were made for, all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec, LayerTables
from kvquant_compile.lowering.cpp.constants import cpp_constants
from kvquant_compile.lowering.gluon import launch
from kvquant_compile.lowering.remembered import Remembered
from kvquant_compile.lowering.triton.append_constants import append_constants
from kvquant_compile.lowering.triton.prepared import prepared
from tests.lowering.reference import half_rope
from tests.triton.cases import Built, Case

NARROW = Case(CodecSpec(3, 2, 0, 0, False, 0), (32, 32), half_rope(32, 32))
WIDE = replace(NARROW, spec=CodecSpec(3, 4, 0, 0, False, 0), seed=1)


def test_made_once_and_gone_with_any_of_the_tensors() -> None:
    known: Remembered[list[int]] = Remembered()
    first, second, made = torch.zeros(1), torch.zeros(1), []

    def make() -> list[int]:
        made.append(1)
        return []

    assert known.get([first, second], make) is known.get([first, second], make)
    assert known.get([first], make) is not known.get([first, second], make)
    assert known.get([first], make, "other") is not known.get([first], make)
    assert len(made) == 3
    del second
    assert len(known._known) == 2
    del first
    assert not known._known


def layers_that_share_keys() -> tuple[Built, Built]:
    """Two layers whose keys have the same tensors and whose values have not, as in two mixtures."""
    narrow, wide = NARROW.build(), WIDE.build()
    first, second = (dict(LayerTables(*x.cache.tables).tensors()) for x in (narrow, wide))
    shared = {name: t for name, t in first.items() if name.startswith("key_")}
    tables = list(LayerTables(**(second | shared)).tensors().values())
    return narrow, replace(wide, cache=replace(wide.cache, tables=tables))


Make = Callable[[PageLayout, list[Tensor], list[Tensor]], Any]
MAKERS: dict[str, tuple[Make, str]] = {
    "C++": (cpp_constants, "value_table"),
    "Triton": (prepared, "value_bytes"),
    "Triton's append": (lambda _, tables, __: append_constants(tables), "value_levels"),
    "Gluon": (lambda *layer: launch._constants(*layer, 4), "block"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_layers_that_share_keys_have_values_of_their_own(name: str) -> None:
    make, part = MAKERS[name]
    made = [
        getattr(make(x.layout, x.cache.tables, x.cache.geometry), part)
        for x in layers_that_share_keys()
    ]
    assert made[0].shape != made[1].shape or not torch.equal(*made)


def test_larger_steps_leave_the_counters_of_a_captured_one_alone() -> None:
    table = torch.zeros(1, 4, dtype=torch.int32)
    small = launch._counters(table, 8)
    assert launch._counters(table, 32) is not small
    assert launch._counters(table, 8) is small
