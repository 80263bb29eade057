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


def graph_seconds(calls: Sequence[Call], budget: float = 0.06, rounds: int = 1) -> float:
    """Median seconds of one call in replays of a CUDA graph that holds all of them.

    Args:
        calls: the same work on different inputs; all of them go into the graph, in turn.
        budget: seconds of device time to spend (at least five replays).
        rounds: how often the graph holds the calls.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return _replays(graph.replay, budget) / (rounds * len(calls))


def _replays(replay: Call, budget: float) -> float:
    """Median seconds of ``replay`` between device events."""
    times: list[float] = []
    while sum(times) < budget or len(times) < 5:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
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
