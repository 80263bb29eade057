"""A graph backend for CPUs that has the limits of a CUDA graph, and says where they are broken.

``capture`` keeps the callable and a replay calls it again, under a dispatch mode that refuses
whatever waits for the device and checks that every tensor from outside lies where it lay at the
first replay. A real graph would read the old address.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvquant_compile.lowering import ops
from kvquant_compile.runtime.program import Program

# What copies to the host, or has a shape that depends on data.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
)


class HostSyncError(AssertionError):
    """An operation waited for the device, or a tensor moved, where neither may be."""


class Watch(TorchDispatchMode):
    """Refuses operations that wait for the device, and collects the addresses of tensors that
    were not made while it was on.

    Args:
        inside_ops: look into our own ops too (they run kernels, not the torch path).
    """

    def __init__(self, inside_ops: bool) -> None:
        super().__init__()
        self.inside_ops = inside_ops
        self.addresses: set[int] = set()
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._kept: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise HostSyncError(f"{func} waits for the device")
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and not self._is_made(tensor) and tensor.numel():
                self.addresses.add(tensor.untyped_storage().data_ptr())
        own = {ops.append: ops._append_impl, ops.attend: ops._attend_impl}.get(func)
        if own is not None and self.inside_ops:
            with self:
                out = own(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._kept.append(tensor.untyped_storage())
        return out

    def _is_made(self, tensor: Tensor) -> bool:
        pointer = tensor.untyped_storage().data_ptr()
        return any(storage.data_ptr() == pointer for storage in self._kept)


@contextlib.contextmanager
def no_host_sync(inside_ops: bool = True) -> Iterator[Watch]:
    """Fail where something waits for the device."""
    with Watch(inside_ops) as watch:
        yield watch


class Recording:
    """The backend.

    Args:
        inside_ops: watch our own ops as well; the torch path of a CPU does wait.

    Attributes:
        captures, replays: how many there were.
        fail: raised at the next capture, if set.
        interrupt: called before every replay.
    """

    def __init__(self, inside_ops: bool = False) -> None:
        self.inside_ops = inside_ops
        self.captures = self.replays = 0
        self.fail: Exception | None = None
        self.interrupt: Callable[[], None] = lambda: None
        self.place: Hashable | None = "here"

    def refusal(self, program: Program) -> str:
        return ""

    def release(self) -> None:
        """Nothing is held."""

    def context(self, device: torch.device) -> Hashable | None:
        return self.place

    def capture(self, body: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        """Keep the callable."""
        self.captures += 1
        if self.fail is not None:
            raise self.fail
        output: Tensor | None = None
        addresses: set[int] | None = None

        def replay() -> Tensor:
            nonlocal output, addresses
            self.replays += 1
            self.interrupt()
            with torch.inference_mode(False), torch.no_grad(), Watch(self.inside_ops) as watch:
                new = body()
            if addresses not in (None, watch.addresses):
                raise HostSyncError("a tensor that the graph reads or writes has moved")
            addresses = watch.addresses
            if output is None:
                output = new
            else:  # as a graph does: the next replay overwrites what this one returned
                output.copy_(new)
            return output

        return replay
