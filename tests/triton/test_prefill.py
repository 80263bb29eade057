"""Prefill: the cases in Triton's interpreter, compilation without a device, what the host knows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.triton.compat import unavailable
from tests.lowering.reference import half_rope
from tests.triton.cases import Case

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")
CASE = Case(CodecSpec(3, 3, 0, 0, False, 0), (16, 16), half_rope(16, 16), steps=20)


def run(*arguments: str, interpret: bool) -> str:
    """Output of a module of the tests in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("part", ["prefill", "flash"])
def test_in_the_interpreter(part: str) -> None:
    run("tests.triton.run_cases", part, interpret=True)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles_ahead_of_time(target: str) -> None:
    steps = () if target == "cuda:90" else ("plain",)
    lines = run("tests.triton.prefill_ahead", target, *steps, interpret=False).splitlines()
    plain = [line for line in lines if line.startswith("plain")]
    assert len(plain) == 5, lines
    if target.startswith("cuda"):
        for line in plain:
            assert "spilled bytes 0" in line or target != "cuda:90", line
            assert int(re.findall(r"shared (\d+)", line)[0]) <= 99 * 1024, line


def test_bounds_are_read_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvquant_compile.lowering.triton import prefill

    built = replace(CASE, lengths=(70, 5), padding=2).build()
    reads = []
    read = prefill._read_bounds
    monkeypatch.setattr(prefill, "_read_bounds", lambda *x: reads.append(x) or read(*x))
    for _ in range(3):
        bounds = prefill.step_bounds(built.slots, built.history, built.cache)
    assert bounds == prefill.Bounds(5, 70, 70 + 20 - 2 - 1, padded=True, hidden=False)
    assert len(reads) == 1
    built.history += 1  # in place, as a graph's static input is
    assert prefill.step_bounds(built.slots, built.history, built.cache).longest == 71
    assert prefill.step_bounds(built.slots.clone(), built.history, built.cache).longest == 71
    assert len(reads) == 3


def test_hidden_tokens_are_noticed() -> None:
    from kvquant_compile.lowering.triton import prefill

    for hidden in (0, 3):
        built = replace(CASE, lengths=(70, 70), hidden=hidden).build()
        bounds = prefill.step_bounds(built.slots, built.history, built.cache)
        assert bounds.hidden == (hidden > 0)
        assert not bounds.padded


@pytest.mark.parametrize("batch", [1, 4, 5, 64])
def test_a_block_is_pages_and_bounded(batch: int) -> None:
    from kvquant_compile.lowering.triton import prefill

    tokens = prefill.block_tokens(batch)
    assert tokens % 64 == 0
    assert prefill.BLOCK_TOKENS // 8 <= tokens <= prefill.BLOCK_TOKENS


def test_other_devices_have_no_device_flash() -> None:
    from kvquant_compile.lowering.torch_internals import device_flash

    q = torch.randn(1, 2, 4, 16)
    assert device_flash(q, q, q, 1.0, causal=True) is None
