"""Stateful fuzzing of the cache: 300 steps by default, 12,000 with ``--slow``."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from transformers import PreTrainedModel

import kvquant_compile
from tests.fuzz.machine import CacheMachine
from tests.zoo import tiny, tokens

STEPS = 50


@functools.cache
def optimised(bits: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    calibration = tokens(4, 64, seed=7)
    options = {"calibration": calibration, "sensitivity": "none", "progress": False}
    return kvquant_compile.optimize(tiny("llama").to(dtype), bits=bits, **options)


class Lossless(CacheMachine):
    """Raw pages against the original model with transformers' own cache."""

    def __init__(self) -> None:
        self.optimised, self.original = optimised(16), tiny("llama")
        super().__init__()


class ThreeBits(CacheMachine):
    """Packed pages against pages of the row alone; where codes turn, they are few."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.optimised = optimised(3, self.dtype)
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


MACHINES = [Lossless, ThreeBits, ThreeBitsExactly]


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
