"""The one private interface of torch that memory is measured with.

The profiler that torch documents reports the same events, but writes to the terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_autograd: Any = torch.autograd


def cpu_allocations(run: Callable[[], object]) -> list[int]:
    """Every allocation on the CPU while ``run`` runs, in order: bytes, negative where freed.

    Only the calling thread is watched, and memory that it allocates.
    """
    settings = torch._C._profiler._ExperimentalConfig()
    kind = _autograd.ProfilerState.CPU
    config = _autograd.ProfilerConfig(kind, False, True, False, False, False, settings)
    _autograd._enable_profiler_legacy(config)
    try:
        run()
    finally:
        records: Any = _autograd._disable_profiler_legacy()
    events = (event for thread in records for event in thread)
    return [event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc"]
