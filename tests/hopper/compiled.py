"""Compiles a kernel of the Hopper back end for a GPU that need not be there."""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from kvquant_compile.lowering.hopper.module import hopper_kernel
from kvquant_compile.lowering.hopper.spec import HopperSpec

TYPES = {
    "query": "*fp16", "addresses": "*i64", "frequencies": "*fp32", "rope_scale": "*fp32",
    "key_unit": "*fp32", "gain": "*fp32", "offset": "*fp32", "partial": "*fp32",
    "partial_lse": "*fp32", "scale": "fp32", "softcap": "fp32",
    "query_order": "*i32", "slots": "*i32", "history": "*i32", "table": "*i32",
    "positions": "*i32", "constants": "*i32", "counters": "*i32",
}  # fmt: skip


def compile_hopper(
    spec: HopperSpec, arch: int = 90, *, exact: bool = True, sinks: int = 1, **options: Any
) -> Any:
    """Triton's compiled object."""
    kernel = hopper_kernel(spec)
    signature = {
        name: "constexpr" if name.isupper() else TYPES.get(name, "i32") for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(signature)
        if signature[name].startswith("*") or name == "page_bytes"
    }
    source = GluonASTSource(
        fn=kernel, signature=signature, constexprs={"EXACT": exact, "SINKS": sinks}, attrs=aligned
    )
    options = {"num_warps": spec.warps} | options
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
