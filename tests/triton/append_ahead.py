"""Compiles the append kernel for targets without a device and prints what it needs.

Arguments: bits, then targets (``cuda:90``, ``hip:gfx942``) each with the tokens of a program and a
head size: ``cuda:90/1/128`` or ``cuda:90/16/128``, or with exact last tokens ``cuda:90/16/128/64``.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.triton.append import append_kernel, options
from kvquant_compile.lowering.triton.append_source import AppendSpec
from tests.triton.ahead import spilled_bytes

POINTERS = {
    "key": "*fp16", "value": "*fp16", "sinks": "*fp16", "starts": "*i32", "counts": "*i32",
    "inverse": "*i32", "table": "*i32", "addresses": "*i64", "scratch": "*u8", "order": "*i64",
    "key_channels": "*fp32", "key_rows": "*fp32", "key_levels": "*fp32", "key_feedback": "*fp16",
    "value_channels": "*fp32", "value_levels": "*fp32", "value_feedback": "*fp16",
}  # fmt: skip


def main(bits: str, *targets: str) -> None:
    """Compile and report."""
    for target in targets:
        compile_for(bits, *target.split("/"))


def compile_for(bits: str, target: str, tokens: str, dim: str, recent: str = "0") -> None:
    """Compile for one target and report."""
    backend, arch = target.split(":")
    gpu = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    width, size = int(bits), int(dim)
    spec = CodecSpec(width, width, 1, 1, True, 1, int(recent))
    layout, shared = PageLayout(spec, 8, size, size, 2), tokens == "1" and spec.recent_tokens > 0
    kernel = append_kernel(AppendSpec(layout, int(tokens), 1, True, True, False, shared))
    pointers = POINTERS
    if tokens == "1":
        pointers = {**POINTERS, "key_feedback": "*i32", "value_feedback": "*i32"}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name.isupper() else pointers.get(name, "i32")
        signature[name] = "*i16" if kind == "*fp32" and "levels" in name and width > 4 else kind
        if kind.startswith("*") or name == "page_bytes":
            aligned[(i,)] = [["tt.divisibility", 16]]
    constants = {"FUSED": True, "NATIVE": backend == "cuda"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=gpu, options=options(int(tokens)))
    print(f"{target}, {tokens}: shared {compiled.metadata.shared} B")
    if backend == "cuda":
        print(f"spilled bytes {spilled_bytes(compiled.asm['ptx'], arch)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
