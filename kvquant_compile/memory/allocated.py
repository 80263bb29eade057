"""What torch allocates while something runs, and what a model holds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvquant_compile.memory.torch_internals import cpu_allocations


@dataclass(frozen=True)
class Allocated:
    """Bytes beyond what was allocated before.

    Attributes:
        peak: at the worst moment.
        kept: in the end.
    """

    peak: int
    kept: int


def allocated(run: Callable[[], object], device: torch.device) -> Allocated:
    """What ``run`` allocates on a device; its result is dropped.

    Allocators' own rounding and caching are left out on a CPU, and on a GPU counted as the
    allocator counts them.
    """
    with _no_collection():
        return _on_cpu(run) if device.type == "cpu" else _on_gpu(run, device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """What is garbage already would be freed, and subtracted, in between."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _on_gpu(run: Callable[[], object], device: torch.device) -> Allocated:
    gc.collect()  # its memory may be what the run lacks
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Allocated(peak, torch.cuda.memory_allocated(device) - before)


def _on_cpu(run: Callable[[], object]) -> Allocated:
    now = peak = 0
    for change in cpu_allocations(run):
        now += change
        peak = max(peak, now)
    return Allocated(peak, now)


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), str(tensor.device)] = storage.nbytes()
    return sum(storages.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones counted once."""
    return held([*model.parameters(), *model.buffers()])
