"""What the runtime needs of torch outside its documented API; for torch 2.11 to 2.13."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def abandon_pool(device: torch.device, pool: Any) -> None:
    """After a CUDA graph's ``capture_end`` failed: let the allocator stop waiting for it.

    torch 2.11 forgets to (pytorch/pytorch#180395), and would free nothing from then on; later
    versions answer that there is nothing to end.

    Args:
        device: of the capture.
        pool: the memory pool that was captured into (``torch.cuda.graph_pool_handle``).
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        index = torch.cuda.current_device() if device.index is None else device.index
        with contextlib.suppress(RuntimeError):
            end(index, pool)


def end_random_capture(device: torch.device) -> None:
    """After a CUDA graph's ``capture_end`` failed: let random numbers be drawn again.

    torch 2.11 leaves the device's generator in capture mode, in which it refuses to be used; the
    end of any later capture takes it out. So one follows, of a single fill, on the current stream.

    Args:
        device: of the capture.
    """
    held = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    held.zero_()
    graph.capture_end()
