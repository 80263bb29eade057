"""Compiles a kernel of the Gluon back end for a GPU that need not be there."""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from kvquant_compile.lowering.gluon.module import gluon_kernel
from kvquant_compile.lowering.gluon.spec import GluonSpec

HOPPER_SHARED = 228 << 10
"""Bytes of shared memory of a multiprocessor."""

HALVES = ("query", "key", "value", "sinks", "output")
FLOATS = (
    "sink_logits", "coefficients", "rope_scale", "key_unit", "gain", "offset", "partial",
    "partial_lse", "output_lse",
)  # fmt: skip
WORDS = (
    "query_order", "slots", "history", "table", "positions", "constants", "turns", "counters",
)  # fmt: skip
TYPES = (
    dict.fromkeys(HALVES, "*fp16") | dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(WORDS, "*i32")
    | {"scale": "fp32", "softcap": "fp32"}
)  # fmt: skip


def compile_gluon(
    spec: GluonSpec,
    arch: int = 90,
    *,
    exact: bool = True,
    sinks: int = 1,
    logits: bool = False,
    one_slab: bool = False,
    **options: Any,
) -> Any:
    """Triton's compiled object; ``exact`` to ``one_slab`` are the kernel's constants."""
    kernel = gluon_kernel(spec)
    types = TYPES | {"addresses": "*u8" if one_slab else "*i64"}
    signature = {
        name: "constexpr" if name.isupper() else types.get(name, "i32") for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(signature)
        if signature[name].startswith("*") or name == "page_bytes"
    }
    constants = {"EXACT": exact, "SINKS": sinks, "LOGITS": logits, "ONE_SLAB": one_slab}
    constants["HEADS"] = spec.layout.heads
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": spec.warps, "enable_fp_fusion": True} | options
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
