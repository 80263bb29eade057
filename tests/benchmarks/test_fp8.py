"""The FP8 peer computes attention: a peer that is wrong is no peer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvquant_compile.lowering.triton.compat import unavailable


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")
def test_every_setting_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.fp8_cases"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    assert done.stdout.count("tokens, group of") == 15
