"""The kernels in Triton's interpreter, on CPU tensors, against float64.

The interpreter is chosen when Triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvquant_compile.lowering.triton.compat import unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")


@pytest.mark.parametrize("part", ["formats", "features", "append"])
def test_in_the_interpreter(part: str) -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton.run_cases", part]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
