"""The threads that kernels run on: torch's own OpenMP pool where there is one.

A second pool would fight the first for cores, because idle OpenMP threads spin for a while.
``GOMP_parallel`` is GNU's entry point, which LLVM's and Intel's runtimes provide as well.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_RUNTIMES = ("libgomp", "libomp", "libiomp5")


@functools.cache
def parallel_address() -> int:
    """Address of the loaded OpenMP runtime's ``GOMP_parallel``; 0 without one, then kernels start
    threads of their own."""
    for path in _loaded():
        entry = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if entry is not None:
            return ctypes.cast(entry, ctypes.c_void_p).value or 0
    return 0


def _loaded() -> list[str]:
    """OpenMP runtimes that this process has loaded, torch's own first (Linux)."""
    if not _MAPS.exists():
        return []
    fields = (line.split(maxsplit=5) for line in _MAPS.read_text().splitlines())
    paths = dict.fromkeys(f[5] for f in fields if len(f) == 6)
    found = [p for p in paths if Path(p).name.startswith(_RUNTIMES)]
    return sorted(found, key=lambda path: "torch" not in path)
