"""What Triton and ptxas make of the Gluon back end's kernels, without a GPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kvquant_compile.lowering.gluon.memory import Memory
from kvquant_compile.lowering.triton.compat import unavailable
from tests.gluon.test_interpreted import SMALL

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")

OLD_TRITON = os.environ.get("KVQUANT_TRITON_36", "")
"""A folder with Triton 3.6, the oldest one that is supported."""

COMMON = ("plain", "default")
LARGE = ("plain, no RoPE", "plain, 8 columns", "default, 8 columns", "default, 256 channels",
         "recent", "recent, 8 columns")  # fmt: skip
TARGETS = [
    *(pytest.param("90", name, "", id=f"sm_90, {name}") for name in COMMON),
    *(pytest.param("90", name, "", id=f"sm_90, {name}", marks=pytest.mark.slow) for name in LARGE),
    *(
        pytest.param(arch, "default", "", id=f"sm_{arch}, default", marks=marks)
        for arch, marks in (("80", ()), ("86", pytest.mark.slow), ("100", ()), ("120", ()))
    ),
    pytest.param("80", "default, 8 columns", "", id="sm_80, 8 columns", marks=pytest.mark.slow),
    *(
        pytest.param(
            "90", name, OLD_TRITON, id=f"sm_90, {name}, Triton 3.6",
            marks=pytest.mark.skipif(
                not OLD_TRITON, reason="set KVQUANT_TRITON_36 to a folder with Triton 3.6"
            ),
        )
        for name in COMMON
    ),
]  # fmt: skip


@functools.cache
def compiled(arch: str, name: str, folder: str) -> dict[str, Any]:
    """Facts of a kernel, compiled in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder:
        env["PYTHONPATH"] = os.pathsep.join([folder, env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gluon.ahead", arch, name],
        env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if folder:
        assert report["triton"].startswith("3.6."), f"Triton {report['triton']} is in {folder}"
    return report["kernels"][name]


@pytest.mark.parametrize(("arch", "name", "folder"), TARGETS)
def test_a_kernel_as_it_is_launched(arch: str, name: str, folder: str) -> None:
    found = compiled(arch, name, folder)
    assert found["stack frame"] == found["spill stores"] == found["spill loads"] == 0, found
    assert found["registers"] <= found["register limit"]
    assert found["products in the loop"] > 0, "the main loop was not found"
    assert found["matrix moves in the loop"] == 0, "an operand goes through shared memory"
    assert found["program barriers in the loop"] == 0, "warps wait for each other in the loop"


@pytest.mark.parametrize(("arch", "name", "folder"), TARGETS)
def test_what_we_rely_on_in_triton(arch: str, name: str, folder: str) -> None:
    found = compiled(arch, name, folder)
    assert found["shared symbols"] == ["global_smem"], (
        "PTX of the kernels takes the start of shared memory from the symbol global_smem; this"
        " Triton calls it otherwise (see _write_frame in lowering/gluon/history.py)"
    )
    assert found["flag declarations"] == 1, (
        "one inline statement declares the register kvq_flag for all later ones; the compiler"
        " has dropped or copied it"
    )
    assert found["flag in a scope of its own"] == 0, (
        "inline statements must not be wrapped in braces: kvq_flag is declared in one and used in"
        " others, which is how a value that all lanes share becomes a branch condition"
    )
    assert found["shared bytes"] >= found["shared bytes asked for"]


def test_triton_keeps_out_of_our_shared_memory() -> None:
    """We take ours to begin at global_smem; what Triton allocates itself must lie behind."""
    from tests.gluon import interpret
    from tests.gluon.ptx.machine import Warp
    from tests.gluon.ptx.operands import SHARED_BASE
    from tests.gluon.ptx.shared import Shared

    touched: list[int] = []
    original = interpret.decoded

    def watched(spec: Any, constants: Any) -> Any:
        kernel, shared_bytes = original(spec, constants)
        size = Memory(spec).size

        def watch(instruction: Any) -> Any:
            def run(warp: Warp, mask: Any) -> Any:
                places = Shared._places

                def checked(shared: Shared, n: int, at: Any, *rest: Any) -> Any:
                    touched.extend((at - SHARED_BASE - size).tolist())
                    return places(shared, n, at, *rest)

                with mock.patch.object(Shared, "_places", checked):
                    return instruction.run(warp, mask)

            return replace(instruction, run=run)

        own = ("stmatrix", "ldmatrix", "st.shared::cta")  # ours are spelled st.shared
        code = tuple(watch(i) if i.text.startswith(own) else i for i in kernel.code)
        return replace(kernel, code=code), shared_bytes

    with mock.patch.object(interpret, "decoded", watched):
        interpret.interpret(SMALL["default"].build())
    assert touched, "Triton touches no shared memory of its own: find it under another name"
    assert min(touched) >= 0, "Triton writes into the first bytes of our shared memory"
