"""Runs the Gluon back end's own launch on CPU tensors, its kernels in the interpreter of PTX.

Little stands in for a device: a launcher that executes the PTX, what the device would say of
itself, the number of splits, and page slabs that lie in the interpreter's memory, so that the
addresses in the page table hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kvquant_compile.lowering.gluon import launch
from kvquant_compile.lowering.gluon.module import gluon_kernel
from kvquant_compile.lowering.gluon.spec import GluonSpec
from tests.gluon.compiled import HOPPER_SHARED, compile_gluon
from tests.gluon.ptx.decode import Kernel, decode
from tests.gluon.ptx.machine import Schedule
from tests.gluon.ptx.machine import launch as run
from tests.gluon.ptx.memory import Memory
from tests.triton.cases import Built

OUTPUTS = ("partial", "partial_lse", "output", "output_lse")
CAPACITY = 48 << 20

ORDERS: dict[str, Callable[[tuple[int, int, int]], int]] = {
    "own first": lambda place: place[1],
    "own last": lambda place: -place[1],
}
"""Orders of programs besides a random one; number 0 along y attends to exact tokens."""


@functools.cache
def decoded(spec: GluonSpec, constants: tuple[tuple[str, Any], ...]) -> tuple[Kernel, int]:
    """A kernel and its bytes of shared memory; ``constants`` are its compile-time arguments."""
    text, shared_bytes = emitted(spec, constants)
    return decode(text, spec.name), shared_bytes


def emitted(spec: GluonSpec, constants: tuple[tuple[str, Any], ...]) -> tuple[str, int]:
    """The PTX that Triton emits for Hopper or Ampere, and the bytes of shared memory."""
    options = {name.lower(): value for name, value in constants}
    compiled = compile_gluon(spec, 90 if spec.bulk else 80, **options)
    return compiled.asm["ptx"], compiled.metadata.shared


@dataclass
class Launcher:
    """Stands in for a jitted kernel: ``launcher[grid](*arguments, **constants)``."""

    spec: GluonSpec
    memory: Memory
    seed: int
    order: str
    counters: list[Tensor]

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, int, int], *values: Any, **options: Any) -> None:
        constants = tuple((name, value) for name, value in options.items() if name.isupper())
        kernel, shared_bytes = decoded(self.spec, constants)
        names = [n for n in gluon_kernel(self.spec).arg_names if not n.isupper()]
        given = dict(zip(names, values, strict=True))
        tensors = {n: x for n, x in given.items() if isinstance(x, Tensor)}
        addresses = {x.data_ptr(): self.memory.place(_bytes(x)) for x in tensors.values()}
        for name in OUTPUTS:
            x = tensors[name]
            self.memory.view(addresses[x.data_ptr()], x.nbytes)[:] = 0xFF  # NaN of any type
        places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        order = sorted(places, key=ORDERS[self.order]) if self.order in ORDERS else None
        arguments = [addresses[x.data_ptr()] if isinstance(x, Tensor) else x for x in values]
        schedule = Schedule(self.seed, order=order)
        run(kernel, grid, options["num_warps"], shared_bytes, arguments, self.memory, schedule)
        for name in (*OUTPUTS, "counters"):
            x = tensors[name]
            found = self.memory.view(addresses[x.data_ptr()], x.nbytes)
            x.copy_(torch.from_numpy(found.copy()).view(x.dtype).view(x.shape))
        self.counters.append(tensors["counters"])


def _bytes(x: Tensor) -> Any:
    """What lies behind a tensor's pointer, strides and all."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.as_strided((last + 1,), (1,)).view(torch.uint8).numpy()


@dataclass(frozen=True)
class Outcome:
    """What a launch left: output [B, S, Hq, Dv], log-sum-exps [B, Hq, S], every counter."""

    output: Tensor
    lse: Tensor
    counters: Tensor


def interpret(
    built: Built,
    *,
    splits: int = 2,
    seed: int = 0,
    order: str = "random",
    deterministic: bool = False,
    bulk: bool = True,
) -> Outcome:
    """``launch.attend`` of a case; see :class:`~.ptx.machine.Schedule` for seed and order."""
    memory = Memory(CAPACITY)
    counters: list[Tensor] = []
    slabs = []
    for slab in built.cache.pages:
        place = memory.view(memory.place(slab.numpy()), slab.nbytes)
        slabs.append(torch.from_numpy(place).view(slab.shape))
    cache = replace(built.cache, pages=slabs)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with (
            mock.patch.object(
                launch, "gluon_kernel", lambda s: Launcher(s, memory, seed, order, counters)
            ),
            mock.patch.object(launch, "split_count", return_value=splits),
            mock.patch.object(launch, "bulk_copies", return_value=bulk),
            mock.patch.object(launch, "shared_memory", return_value=HOPPER_SHARED),
            mock.patch.object(launch, "multiprocessors", return_value=132),
        ):
            output, lse = launch.attend(*replace(built, cache=cache).arguments())
    finally:
        torch.use_deterministic_algorithms(before)
    return Outcome(output, lse, torch.cat(counters))
