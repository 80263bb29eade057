"""Runs ``kvquant::append`` on CPU tensors, its kernel as the PTX that Triton emits for Hopper.

Unlike Triton's own interpreter this executes the inline assembly, and the reductions, gathers and
conversions that Triton makes of a kernel. Compilation specialises as a launch on a device does:
numbers that are 1 are constants, and multiples of 16 are known as such.
"""

# mypy: ignore-errors
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvquant_compile.lowering.triton import append as kernels
from kvquant_compile.lowering.triton.append_source import AppendSpec
from tests.gluon.ptx.decode import Kernel, decode
from tests.gluon.ptx.machine import Schedule, launch
from tests.gluon.ptx.memory import Memory

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
    torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8",
}  # fmt: skip
REAL_KERNEL, REAL_ADDRESSES = kernels.append_kernel, kernels.page_addresses
CAPACITY = 4 << 20
"""Bytes for the arguments of a launch."""


@functools.cache
def emitted(
    spec: AppendSpec, kinds: tuple[tuple[str, Any], ...], aligned: frozenset[int]
) -> tuple[str, int]:
    """A kernel's PTX and its bytes of shared memory.

    Args:
        spec: of the kernel.
        kinds: every argument's type, or its value where that is a constant.
        aligned: places of arguments that are multiples of 16.
    """
    constants = {n: kind for n, kind in kinds if not isinstance(kind, str)}
    source = ASTSource(
        fn=REAL_KERNEL(spec),
        signature={n: "constexpr" if n in constants else kind for n, kind in kinds},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = kernels.options(spec.tokens)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return made.asm["ptx"], made.metadata.shared


@functools.cache
def decoded(spec: AppendSpec, *how: Any) -> tuple[Kernel, int]:
    """The same, ready to run."""
    text, shared = emitted(spec, *how)
    return decode(text, spec.name), shared


@dataclass(frozen=True)
class Launcher:
    """Stands in for a jitted kernel: ``launcher[grid](*arguments, **options)``."""

    device: Device
    spec: AppendSpec

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return functools.partial(self.device.run, self.spec, grid)


@dataclass
class Device:
    """Stands in for a device: its memory, how programs are ordered, what has run.

    Pages are moved to the memory when their addresses are asked for, and back after the launch.
    """

    seed: int = 0
    memory: Memory | None = None
    moved: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    launched: list[AppendSpec] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Launches of the append kernel run here."""
        with (
            mock.patch.object(kernels, "append_kernel", lambda spec: Launcher(self, spec)),
            mock.patch.object(kernels, "page_addresses", self._page_addresses),
        ):
            yield

    def _page_addresses(self, slabs: list[Tensor]) -> Tensor:
        self.memory = memory = Memory(sum(x.nbytes for x in slabs) + CAPACITY)
        places = [memory.view(memory.place(x.numpy()), x.nbytes) for x in slabs]
        there = [torch.from_numpy(p).view(x.shape) for p, x in zip(places, slabs, strict=True)]
        self.moved = list(zip(slabs, there, strict=True))
        return REAL_ADDRESSES(there)

    def run(self, spec: AppendSpec, grid: tuple[int, int, int], *values: Any, num_warps: int,
            **_options: Any) -> None:  # fmt: skip
        """One launch."""
        names = REAL_KERNEL(spec).arg_names
        given = dict(zip(names, values, strict=True))
        kinds = tuple((n, _kind(n, x)) for n, x in given.items())
        aligned = frozenset(
            i for i, (n, x) in enumerate(given.items())
            if isinstance(_kind(n, x), str) and (isinstance(x, Tensor) or x % 16 == 0)
        )  # fmt: skip
        kernel, shared = decoded(spec, kinds, aligned)
        memory = self.memory
        at = {id(x): memory.place(_behind(x).numpy()) for x in values if isinstance(x, Tensor)}
        arguments = [
            at[id(x)] if isinstance(x, Tensor) else x
            for (_, kind), x in zip(kinds, values, strict=True) if isinstance(kind, str)
        ]  # fmt: skip
        launch(kernel, grid, num_warps, shared, arguments, memory, Schedule(self.seed))
        for slab, there in self.moved:
            slab.copy_(there)
        sinks = given["sinks"]
        found = torch.from_numpy(memory.view(at[id(sinks)], sinks.nbytes).copy())
        sinks.copy_(found.view(sinks.dtype).view(sinks.shape))
        self.launched.append(spec)


def _kind(name: str, value: Any) -> Any:
    """The type of an argument, or the value of a constant."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return value if name.isupper() or value == 1 else "i32"


def _behind(x: Tensor) -> Tensor:
    """What lies behind a tensor's pointer, strides and all, as bytes."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.as_strided((last + 1,), (1,)).view(torch.uint8)
