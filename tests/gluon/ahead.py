"""Compiles kernels as they are launched, without a device, and prints what came out as JSON.

Arguments: the architecture (80, 86, 90, 100, 120), and names of :data:`KERNELS`.
"""

# mypy: ignore-errors
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.gluon import launch
from kvquant_compile.lowering.gluon.memory import Memory
from kvquant_compile.lowering.gluon.spec import GluonSpec
from tests.gluon.compiled import compile_gluon
from tests.triton.ahead import main_loop

PLAIN, DEFAULT = CodecSpec(3, 3, 0, 0, False, 0), CodecSpec(3, 3, 1, 1, True, 1)
SCALED = CodecSpec(3, 3, 0, 0, True, 1)
RECENT = replace(DEFAULT, recent_tokens=64)


def _spec(
    codec: CodecSpec, width: int, explicit: int, groups: int = 1, terms: int = 2
) -> GluonSpec:
    layout = PageLayout(codec, 8, width, width, 2)
    return GluonSpec(
        layout, explicit > 0, explicit, groups, False, False, False, False, terms=terms
    )


KERNELS = {
    "plain": _spec(PLAIN, 128, 2),
    "plain, no RoPE": _spec(PLAIN, 128, 0),
    "plain, 8 columns": _spec(PLAIN, 128, 2, 2),
    "one query, token scales": _spec(SCALED, 128, 1, terms=8),
    "default": _spec(DEFAULT, 128, 2),
    "default, 8 columns": _spec(DEFAULT, 128, 2, 2),
    "default, 256 channels": _spec(DEFAULT, 256, 2),
    "recent": _spec(RECENT, 128, 2),
    "recent, 8 columns": _spec(RECENT, 128, 2, 2),
}


SHARED = {80: 164, 86: 100, 90: 228, 100: 228, 120: 100}
"""KiB of shared memory of a multiprocessor."""


def facts(spec: GluonSpec, arch: int) -> dict[str, Any]:
    """What matters about a compiled kernel, under the register limit of its launch."""
    spec = replace(spec, bulk=arch // 10 >= launch.BULK_COPIES)
    resident = launch.programs_per_multiprocessor(spec, SHARED[arch] << 10)
    limit = launch.register_limit(spec, resident)
    compiled = compile_gluon(spec, arch, maxnreg=limit)
    text = compiled.asm["ptx"]
    loop = main_loop(text)
    return {
        "register limit": limit,
        "matrix moves in the loop": len(re.findall(r"\b(?:ldmatrix|stmatrix)\b", loop)),
        "program barriers in the loop": len(re.findall(r"\bbar\.sync\b", loop)),
        "products in the loop": loop.count("mma.sync"),
        "flag declarations": len(re.findall(r"\.reg \.b32 kvq_flag;", text)),
        "flag in a scope of its own": len(re.findall(r"\{\s*\.reg \.b32 kvq_flag;", text)),
        "programs": resident,
        "shared bytes": compiled.metadata.shared,
        "shared bytes asked for": Memory(spec).size,
        "shared symbols": re.findall(r"\.extern \.shared .*?(\w+)\[\];", text),
        **_resources(text, arch),
    }


def _resources(ptx: str, arch: int) -> dict[str, int]:
    """What ptxas says about registers and spills."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        options = [
            "-v",
            f"--gpu-name=sm_{arch}{'a' * (arch >= 90)}",
            "-o",
            str(Path(folder) / "kernel.cubin"),
        ]
        command = [get_ptxas(arch).path, *options, str(source)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {name: int(n) for n, name in re.findall(r"(\d+) bytes (\w+ \w+)", said)}
    return found | {"registers": int(re.search(r"Used (\d+) registers", said)[1])}


def main(arch: str, *names: str) -> None:
    """Compile and print."""
    out = {name: facts(KERNELS[name], int(arch)) for name in names}
    print(json.dumps({"triton": triton.__version__, "kernels": out}))


if __name__ == "__main__":
    main(*sys.argv[1:])
