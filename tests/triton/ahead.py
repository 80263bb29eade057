"""Compiles one kernel for a target without a device and prints what came out.

Arguments: target (``cuda:90``, ``hip:gfx942``), bits, head size, exact last tokens, key slots.
"""

# mypy: ignore-errors
from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.triton.merge import merge_kernel
from kvquant_compile.lowering.triton.module import history_kernel
from kvquant_compile.lowering.triton.spec import KernelSpec

POINTERS = {
    "query": "*fp16", "query_order": "*i32", "slots": "*i32", "history": "*i32", "table": "*i32",
    "positions": "*i32", "addresses": "*i64", "key_words": "*i32", "turn_words": "*i32",
    "zero_words": "*i32", "query_terms": "*fp32", "key_unit": "*fp32",
    "key_bytes": "*u8", "value_bytes": "*u8", "turns": "*i64", "rope_scale": "*fp32",
    "gain": "*fp32", "offset": "*fp32", "partial": "*fp32",
    "partial_lse": "*fp32", "scale": "fp32", "softcap": "fp32", "key": "*fp16", "value": "*fp16",
    "sinks": "*fp16", "sink_logits": "*fp32", "output": "*fp16", "output_lse": "*fp32",
}  # fmt: skip


def compile_history(spec: KernelSpec, target: GPUTarget, **options: Any) -> Any:
    """Triton's compiled object of a spec's kernel."""
    constants = {"EXACT": True, "SINKS": 1, "STEPS_POW2": 1, "NATIVE": target.backend == "cuda"}
    options = {"num_warps": spec.warps, "num_stages": 1} | options
    return _compiled(history_kernel(spec), constants, target, options)


def compile_merge(spec: KernelSpec, target: GPUTarget) -> Any:
    """Triton's compiled object of what merges a spec's partial results."""
    layout, pairs = spec.layout, spec.pairs
    constants = {
        "DIM": layout.key_dim, "VALUE_DIM": layout.value_dim, "DIM_POW2": layout.key_dim,
        "VALUE_POW2": layout.value_dim, "PAIRS": pairs, "PAIRS_POW2": pairs, "SINKS": 1,
        "SINKS_POW2": 1, "RING": layout.ring, "OWN": 1, "EXACT": True, "CAP": False,
        "WINDOW": True, "LOGITS": False, "ORDER": False, "ROPE": True,
        "NATIVE": target.backend == "cuda",
    }  # fmt: skip
    return _compiled(merge_kernel, constants, target, {"num_warps": 4})


def _compiled(
    kernel: Any, constants: dict[str, Any], target: GPUTarget, options: dict[str, Any]
) -> Any:
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name.isupper() else POINTERS.get(name, "i32")
        if signature[name].startswith("*") or name == "page_bytes":
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def main(target: str, bits: str, dim: str, recent: str = "0", key_slots: str = "1") -> None:
    """Compile and report."""
    backend, arch = target.split(":")
    gpu = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    width, size = int(bits), int(dim)
    spec = CodecSpec(width, width, int(key_slots), 1, True, 1, int(recent))
    layout = PageLayout(spec, 8, size, size, 2)
    explicit = size // 32 if spec.key_slots else 1
    kernel = KernelSpec(layout, size // 16, explicit, 4, False, False, False, False)
    compiled = compile_history(kernel, gpu)
    merge = compile_merge(kernel, gpu)
    text = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    products = text.count("mma.sync") if backend == "cuda" else text.count("mfma")
    print(f"{target}: shared {compiled.metadata.shared} B, matrix products {products}")
    if backend == "cuda":
        body = main_loop(text)
        print(f"matrix moves {body.count('ldmatrix') + body.count('stmatrix')}")
        print(f"barriers {body.count('bar.sync')}")
        spilled = (spilled_bytes(asm, arch) for asm in (text, merge.asm["ptx"]))
        print(f"spilled bytes {sum(spilled)}")


def main_loop(ptx: str) -> str:
    """The text of the innermost loop that holds most matrix products."""
    lines = ptx.split("\n")
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L__BB")}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if jump and labels.get(jump.group(1), i) < i:
            body = "\n".join(lines[labels[jump.group(1)] : i])
            loops.append((-body.count("mma.sync"), len(body), body))
    return min(loops)[2]


def spilled_bytes(ptx: str, arch: str) -> int:
    """Bytes that ptxas spills with all registers allowed, under Triton's options for it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        suffix = "a" if int(arch) >= 90 else ""
        target = f"--gpu-name=sm_{arch}{suffix}"
        binary = str(Path(folder) / "kernel.cubin")
        ptxas = get_ptxas(int(arch))
        options = ["--regAllocOptLevel=2"] if float(ptxas.version) >= 13 else []
        command = [ptxas.path, "-v", *options, target, str(source), "-o", binary]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))


if __name__ == "__main__":
    main(*sys.argv[1:])
