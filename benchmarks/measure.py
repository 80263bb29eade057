"""How everything here is timed, and what is recorded next to a time."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

Call = Callable[[], Any]

SHORT_CALLS, LONG_CALLS = 64, 16
"""Calls of a graph at least: on rotated inputs, and on one that does not fit into the L2 cache."""


def environment() -> dict[str, Any]:
    """Device, versions and date of a run."""
    names = ("torch", "triton", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    if not torch.cuda.is_available():
        device: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    else:
        properties = torch.cuda.get_device_properties(0)
        device = {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {**device, **versions, "python": platform.python_version(), "date": today}


def capture(calls: Sequence[Call], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph that holds all of some calls, in turn, ``repeats`` times.

    Every call runs once before: what it makes at its first run is not part of the graph.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(repeats):
            for call in calls:
                call()
    return graph


def graph_seconds(calls: Sequence[Call], budget: float = 0.06) -> float:
    """Median seconds of one call in replays of a CUDA graph that holds all of them.

    Args:
        calls: the same work on different inputs; all of them go into the graph, in turn.
        budget: seconds of device time to spend (at least five replays).
    """
    graph = capture(calls)
    graph.replay()
    return _replays(graph.replay, budget) / len(calls)


def graph_slice(calls: Sequence[Call]) -> Callable[[float], float]:
    """Replays of a CUDA graph without a pause for about so many seconds; the mean of one call.

    The graph holds so many calls that what lies between two replays (a microsecond or two) is
    a few thousandths of it.
    """
    least = SHORT_CALLS if len(calls) > 1 else LONG_CALLS
    repeats = -(-least // len(calls))
    graph = capture(calls, repeats)
    once = _seconds_of(graph.replay, 1)

    def run(seconds: float) -> float:
        nonlocal once
        once = _seconds_of(graph.replay, max(1, round(seconds / once)))
        return once / (repeats * len(calls))

    return run


def _seconds_of(replay: Call, count: int) -> float:
    """Mean seconds of replays that follow each other, between device events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def _replays(replay: Call, budget: float) -> float:
    """Median seconds of ``replay`` between device events."""
    times: list[float] = []
    while sum(times) < budget or len(times) < 5:
        times.append(_seconds_of(replay, 1))
    return statistics.median(times)


def wall_seconds(call: Call, repeats: int, synchronise: bool = True) -> list[float]:
    """Wall seconds of every one of some calls, the device's work included."""
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if synchronise and torch.cuda.is_available():
            torch.cuda.synchronize()
        out.append(time.perf_counter() - start)
    return out


@triton.jit
def _read(data, out, per_program, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * per_program
    total = tl.zeros([BLOCK], tl.int32)
    for at in tl.range(0, per_program, BLOCK, num_stages=4):
        total ^= tl.load(data + start + at + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def bandwidth(gigabytes: int = 8) -> dict[str, float]:
    """Bytes per second that this device reads and copies, as the roofline of the tables.

    ``read`` is the best of ``torch.max`` and of plain kernels that load and combine every word;
    ``copy`` counts bytes read plus bytes written.
    """
    words = gigabytes * 2**28
    data = torch.empty(words, dtype=torch.int32, device="cuda").random_()
    best = graph_seconds([lambda: torch.max(data)])
    for programs, block, warps in ((8192, 4096, 8), (2048, 8192, 8), (4096, 2048, 4)):
        out = torch.empty(programs, dtype=torch.int32, device="cuda")

        def call(n: int = programs, b: int = block, w: int = warps, to: Any = out) -> None:
            _read[(n,)](data, to, words // n, BLOCK=b, num_warps=w)

        best = min(best, graph_seconds([call]))
    half = words // 2
    copied = graph_seconds([lambda: data[:half].copy_(data[half:])])
    return {"read": 4 * words / best, "copy": 4 * words / copied}


def save(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record as JSON, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def failure(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
