"""Compiles the kernels that a prefill launches, for a target without a device.

The launches are recorded from a real call on CPU tensors, so that the compiled arguments are the
launched ones. Arguments: target (``cuda:90``, ``hip:gfx942``), and steps by name, else all.
"""

# mypy: ignore-errors
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.triton import dequantise, flash, prefill
from tests.lowering.reference import half_rope
from tests.triton.ahead import spilled_bytes
from tests.triton.cases import Case

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
OTHER_DEVICES = {"NATIVE": False, "PRECISION": "ieee"}
PLACES = ((dequantise, ("key_kernel", "value_kernel")), (flash, ("flash_kernel", "combine_kernel")))
STEP = Case(
    CodecSpec(3, 3, 1, 1, True, 1), (128, 128), half_rope(128, 128), heads=2, rep=4,
    lengths=(200, 200), steps=40, dtype=torch.bfloat16,
)  # fmt: skip
STEPS = {
    "plain": STEP,
    "k4v2 window softcap logits": replace(
        STEP, spec=CodecSpec(4, 2, 0, 0, False, 0), window=100, softcap=20.0, sink_logits=True
    ),
    "k5v1 d256": replace(
        STEP, spec=CodecSpec(5, 1, 2, 0, False, 1), dims=(256, 256), rope=half_rope(256, 256)
    ),
    "recent, not exact": replace(STEP, spec=CodecSpec(3, 3, 1, 1, True, 1, 16), exact=False),
    "d80x48 float32": replace(
        STEP, dims=(80, 48), rope=half_rope(80, 40), dtype=torch.float32, spec=CodecSpec(2, 8)
    ),
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    arguments: tuple
    options: dict[str, Any]

    def source(self, backend: str) -> tuple[ASTSource, dict[str, Any]]:
        """What Triton's launcher would compile, and the compiler options."""
        names = self.kernel.arg_names
        given = dict(zip(names, self.arguments, strict=False)) | self.options
        signature, constants, aligned = {}, {}, {}
        for i, name in enumerate(names):
            x = given[name]
            if name.isupper() or (type(x) is int and x == 1):
                signature[name], constants[name] = "constexpr", x
            elif isinstance(x, torch.Tensor):
                signature[name] = TYPES[x.dtype]
                aligned[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(x, float) else "i32"
                if isinstance(x, int) and x % 16 == 0:
                    aligned[(i,)] = [["tt.divisibility", 16]]
        if backend != "cuda":  # as the launcher decides there
            constants |= {n: x for n, x in OTHER_DEVICES.items() if n in constants}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=aligned)
        return source, {n: x for n, x in self.options.items() if n not in names}


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of prefill kernels inside, none of which runs."""
    out: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: out.append(Launch(self.kernel, args, options))

    kernels = {(m, n): getattr(m, n) for m, names in PLACES for n in names}
    for (module, name), kernel in kernels.items():
        setattr(module, name, Recorder(kernel))
    try:
        yield out
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)


def main(target: str, *titles: str) -> None:
    """Compile every distinct kernel of the steps and report."""
    backend, arch = target.split(":")
    gpu = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    print(f"triton {triton.__version__}")
    for title in titles or STEPS:
        with recorded() as launches:
            prefill.attend(*STEPS[title].build().arguments())
        seen = set()
        for launch in launches:
            source, options = launch.source(backend)
            if source.hash() in seen:
                continue
            seen.add(source.hash())
            compiled = triton.compile(source, target=gpu, options=options)
            line = f"{title}: {launch.kernel.__name__} shared {compiled.metadata.shared}"
            if backend == "cuda":
                text = compiled.asm["ptx"]
                products = text.count("wgmma.mma_async") + text.count("mma.sync")
                line += f" products {products} spilled bytes {spilled_bytes(text, arch)}"
            print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
