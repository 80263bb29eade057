"""The append kernel without a device: its division, its constants, and that it compiles.

That it writes the torch path's bytes is tested in :mod:`.test_interpreter` (part ``append``).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.nuq import levels_of, nearest_codes
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.triton.append_constants import append_constants
from kvquant_compile.lowering.triton.compat import unavailable
from tests.codec.cases import random_feedback
from tests.triton.cases import random_tables

compiles = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")


def rounded(x: Fraction) -> np.float32:
    """The nearest float32 of a normal magnitude, ties to even."""
    if x == 0:
        return np.float32(0)
    exponent = math.frexp(float(x))[1] - 24
    return np.float32(math.ldexp(round(x / Fraction(2) ** exponent), exponent))


def fused(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    return rounded(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


@settings(max_examples=300, deadline=None)
@given(
    st.floats(-(2.0**60), 2.0**60, width=32).filter(lambda x: abs(x) > 2.0**-60),
    st.floats(2.0**-30, 2.0**30, width=32),
)
def test_two_corrections_divide_exactly(a: float, b: float) -> None:
    """The arithmetic of ``quotient``, with exact fused multiply-adds."""
    x, y = np.float32(a), np.float32(b)
    reciprocal = np.float32(1) / y
    q = x * reciprocal
    for _ in range(2):
        q = fused(fused(-y, q, x), reciprocal, q)
    assert q == x / y


@pytest.mark.parametrize("bits", [5, 8])
def test_cells_give_nearest_codes_and_levels(bits: int) -> None:
    spec = CodecSpec(bits, bits, 0, 0, False, 0)
    tables = random_tables(spec, 2, 16, 16, torch.Generator().manual_seed(bits))
    x = torch.linspace(-140, 140, 5003).expand(1, 2, 1, -1).contiguous()
    cells = append_constants(list(tables.tensors().values())).key_levels
    place = ((x * 2).floor().clamp(-256, 255) + 256).long()[0, :, 0]
    codes = nearest_codes(x, tables.key_table)
    assert torch.equal(cells[:, 0].gather(1, place), codes[0, :, 0].short())
    assert torch.equal(
        cells[:, 1].gather(1, place), levels_of(codes, tables.key_table)[0, :, 0].short()
    )


def test_feedback_reaches_later_stages_only_and_is_exact() -> None:
    tables = random_tables(CodecSpec(3, 3), 2, 32, 40, torch.Generator().manual_seed(0))
    matrix = random_feedback(2, 40, 3)
    found = append_constants([*list(tables.tensors().values())[:-1], matrix]).value_feedback
    assert found.shape == (2, 48, 64)
    assert torch.equal((found[:, :40, :40].float() * 64).to(torch.int8), matrix)
    assert not found[:, 40:].any()
    assert not found[:, :, 40:].any()


@compiles
def test_compiles_ahead_of_time() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton.append_ahead", "3"]
    command += ["cuda:90/1/128", "cuda:90/16/128", "hip:gfx942/1/32", "hip:gfx942/16/32"]
    command += ["cuda:80/1/32", "cuda:90/1/32/16", "cuda:90/16/32/64"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("spilled bytes 0\n") == 5
