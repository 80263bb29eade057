"""Values live and die with the tensor they were made for."""

from __future__ import annotations

import torch

from kvquant_compile.lowering.gluon import launch
from kvquant_compile.lowering.remembered import Remembered


def test_made_once_and_gone_with_the_tensor() -> None:
    known: Remembered[list[int]] = Remembered()
    anchor, made = torch.zeros(1), []

    def make() -> list[int]:
        made.append(1)
        return []

    assert known.get(anchor, make) is known.get(anchor, make)
    assert len(made) == 1
    del anchor
    assert not known._known


def test_larger_steps_leave_the_counters_of_a_captured_one_alone() -> None:
    table = torch.zeros(1, 4, dtype=torch.int32)
    small = launch._counters(table, 8)
    assert launch._counters(table, 32) is not small
    assert launch._counters(table, 8) is small
