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
