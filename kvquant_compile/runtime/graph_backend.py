"""What captures a function on a device and replays it: CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvquant_compile.lowering.triton.dispatch import refusal as kernel_refusal
from kvquant_compile.runtime.program import Program
from kvquant_compile.runtime.torch_internals import abandon_pool, end_random_capture

Body = Callable[[], Tensor]


class GraphBackend(Protocol):
    """Captures device work once and replays it from then on."""

    def refusal(self, program: Program) -> str:
        """Why no step of a program can be captured; empty where it can."""

    def context(self, device: torch.device) -> Hashable | None:
        """What a replay must have in common with its capture; None where nothing can be captured
        or replayed just now."""

    def capture(self, body: Body, device: torch.device) -> Body:
        """Record what ``body`` does on the device, without doing it.

        Returns:
            A function that does it, and returns the tensor that ``body`` returned at capture,
            with new contents and at the same address.

        Raises:
            Exception: whatever made the capture impossible; nothing was done then.
        """

    def release(self) -> None:
        """Keep nothing but what captured graphs that are still in use need."""


@dataclass(eq=False)
class _Lane:
    """What the graphs that replay on one stream share.

    Attributes:
        stream: where they are captured. cuBLAS keeps a workspace for every stream, and graphs
            that share one must not run at the same time.
        pool: handle of the memory that they share.
        latest: the last graph captured. While it lives the pool does, so that the next capture
            allocates nothing new.
    """

    stream: torch.cuda.Stream
    pool: Any
    latest: torch.cuda.CUDAGraph | None = None


_ONE_CAPTURE = threading.Lock()  # torch allows one at a time in a process


class CudaGraphs:
    """CUDA graphs (on ROCm, HIP graphs).

    Graphs of one stream share memory. They run one after another, and a result has to be copied
    before the next one runs.
    """

    def __init__(self) -> None:
        self._lanes: dict[Hashable, _Lane] = {}

    def refusal(self, program: Program) -> str:
        """See :class:`GraphBackend`."""
        if program.device.type != "cuda":
            return f"a {program.device.type} has none"
        reasons = (kernel_refusal(layout, program.device) for layout in program.layouts)
        return next((f"it waits for the device: {reason}" for reason in reasons if reason), "")

    def context(self, device: torch.device) -> Hashable | None:
        """The current stream's id; None inside somebody else's capture."""
        if torch.cuda.is_current_stream_capturing():
            return None
        return int(torch.cuda.current_stream(device).cuda_stream)

    def capture(self, body: Body, device: torch.device) -> Body:
        """See :class:`GraphBackend`.

        ``torch.cuda.graph`` is not used because it waits for the device and empties the
        allocator's cache first, which takes longer than a step.
        """
        current = torch.cuda.current_stream(device)
        key = int(current.cuda_stream)
        lane = self._lanes.pop(key, None) or _Lane(
            torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        )
        graph = torch.cuda.CUDAGraph()
        lane.stream.wait_stream(current)
        with _ONE_CAPTURE, torch.cuda.stream(lane.stream):
            output = _capture(graph, body, device, lane.pool)
        current.wait_stream(lane.stream)
        lane.latest = graph
        self._lanes[key] = lane  # not after a failure, which leaves the pool in doubt

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def release(self) -> None:
        """See :class:`GraphBackend`."""
        self._lanes.clear()


def _capture(graph: torch.cuda.CUDAGraph, body: Body, device: torch.device, pool: Any) -> Tensor:
    """Capture on the current stream; ended whatever happens, and then the first error raised."""
    # Other threads may allocate and wait as they like meanwhile.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        output = body()
    except BaseException:
        try:
            graph.capture_end()
        except RuntimeError:  # the capture is invalid, as after waiting for the device
            _abandon(device, pool)
        raise
    try:
        graph.capture_end()
    except RuntimeError:
        _abandon(device, pool)
        raise
    return output


def _abandon(device: torch.device, pool: Any) -> None:
    """Undo what a capture that could not be ended left behind in torch."""
    abandon_pool(device, pool)
    end_random_capture(device)
