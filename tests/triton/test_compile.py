"""Ahead-of-time compilation without a GPU, and the generated text itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.errors import OptionError
from kvquant_compile.lowering.triton.compat import unavailable
from kvquant_compile.lowering.triton.dispatch import SWITCH, refusal
from kvquant_compile.lowering.triton.history import history_source
from kvquant_compile.lowering.triton.spec import KernelSpec, unsupported

GOLDEN = Path(__file__).with_name("golden_k3v3_d64.py.txt")
SMALL = KernelSpec(
    PageLayout(CodecSpec(3, 3, 0, 1, True, 1), 2, 64, 16, 2),
    rotated=4, explicit=1, queries=4, softcap=False, window=False, reorder=False, stretched=False,
)  # fmt: skip
compiles = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")


def test_source_is_the_reviewed_text() -> None:
    if os.environ.get("KVQUANT_UPDATE_GOLDEN"):
        GOLDEN.write_text(history_source(SMALL))
    assert history_source(SMALL) == GOLDEN.read_text(), (
        "the generated kernel changed; look at the difference, then set KVQUANT_UPDATE_GOLDEN=1"
    )


def test_equal_specs_share_a_name() -> None:
    wide = replace(SMALL, queries=8)
    assert wide.name != SMALL.name
    assert KernelSpec(**vars(SMALL)).name == SMALL.name


def test_formats_that_are_not_generated_say_why() -> None:
    big = PageLayout(CodecSpec(3, 3), 1, 512, 512, 2)
    assert "512" in unsupported(big)
    assert unsupported(SMALL.layout) == ""


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = torch.device("cuda")
    monkeypatch.delenv(SWITCH, raising=False)
    assert refusal(SMALL.layout, device) == unavailable()
    monkeypatch.setenv(SWITCH, "torch")
    assert SWITCH in refusal(SMALL.layout, device)
    monkeypatch.setenv(SWITCH, "fast")
    with pytest.raises(OptionError, match="portable"):
        refusal(SMALL.layout, device)


@compiles
@pytest.mark.parametrize(
    ("target", "recent", "key_slots"),
    [("cuda:80", 0, 1), ("cuda:90", 0, 0), ("cuda:100", 64, 0), ("hip:gfx942", 16, 0)],
)
def test_compiles_ahead_of_time(target: str, recent: int, key_slots: int) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton.ahead", target, "3", "64"]
    command += [str(recent), str(key_slots)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if target.startswith("cuda"):
        found = {name: int(n) for name, n in re.findall(r"([a-z ]+) (\d+)$", done.stdout, re.M)}
        assert found["spilled bytes"] == 0
        assert found["matrix moves"] == 0, "an operand went through shared memory"
        assert found["barriers"] <= 2
