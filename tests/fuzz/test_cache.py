"""Stateful fuzzing of the cache: 300 steps by default, 12,000 with ``--slow``."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.lowering.recent import ring_slots
from kvquant_compile.runtime.layer import QuantizedLayer
from tests.fuzz.machine import CacheMachine
from tests.zoo import tiny, tokens

STEPS = 50


@functools.cache
def optimised(bits: int, dtype: torch.dtype = torch.float32, recent: int = 0) -> PreTrainedModel:
    calibration = tokens(4, 64, seed=7)
    options = {"calibration": calibration, "sensitivity": "none", "progress": False}
    if recent:
        options["recent_window"] = recent
    return kvquant_compile.optimize(tiny("llama").to(dtype), bits=bits, **options)


class Lossless(CacheMachine):
    """Raw pages against the original model with transformers' own cache."""

    def __init__(self) -> None:
        self.optimised, self.original = optimised(16), tiny("llama")
        super().__init__()


class ThreeBits(CacheMachine):
    """Packed pages against pages of the row alone; where codes turn, they are few."""

    dtype, recent = torch.float32, 0

    def __init__(self) -> None:
        self.optimised = optimised(3, self.dtype, self.recent)
        super().__init__()

    def assert_same_contents(self, ours: torch.Tensor, alone: torch.Tensor, layer: int) -> None:
        turned = (ours - alone).abs() > 0.02 * alone.abs().amax()
        assert int(turned.sum()) <= 2 + ours.numel() // 500


class ThreeBitsExactly(ThreeBits):
    """In float64, whose projections round alike in any batch as far as codes can tell: the first
    layer's pages to the bit."""

    dtype = torch.float64

    def assert_same_contents(self, ours: torch.Tensor, alone: torch.Tensor, layer: int) -> None:
        if layer == 0:
            assert torch.equal(ours, alone)
        super().assert_same_contents(ours, alone, layer)


class Recent(ThreeBitsExactly):
    """With exact last tokens: pages as without them, and no wrong token in the ring. After a crop
    fewer tokens are exact, so that later layers differ from those of the row alone."""

    recent = 16

    def assert_same_contents(self, ours: torch.Tensor, alone: torch.Tensor, layer: int) -> None:
        if layer == 0:
            assert torch.equal(ours, alone)

    def assert_same_ring(
        self, ours: QuantizedLayer, alone: QuantizedLayer, layer: int, row: int
    ) -> None:
        held, whole = (ring_slots(x.sinks, 16) for x in (ours, alone))
        length = int(whole.max()) + 1
        assert sorted(whole[whole >= 0].tolist()) == list(range(max(0, length - 16), length))
        there = (held[row] >= 0) & (held[row] < length)  # what a crop removed is above
        assert torch.equal(held[row][there], whole[0][there])
        if layer == 0:
            lines = slice(-17, -1)
            mine, theirs = ours.sinks[row, :, lines], alone.sinks[0, :, lines]
            assert torch.equal(mine[:, there], theirs[:, there])


MACHINES = [Lossless, ThreeBits, ThreeBitsExactly, Recent]


def run(machine: type[RuleBasedStateMachine], steps: int, *, fixed: bool) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=steps // STEPS,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=fixed,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("machine", MACHINES)
def test_random_use(machine: type[RuleBasedStateMachine]) -> None:
    run(machine, 100, fixed=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("machine", MACHINES)
def test_random_use_for_long(machine: type[RuleBasedStateMachine]) -> None:
    run(machine, 4000, fixed=False)
