"""How CUDA graphs are captured, on a stand-in for ``torch.cuda`` that keeps a log."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from kvquant_compile.runtime import graph_backend, torch_internals
from kvquant_compile.runtime.graph_backend import CudaGraphs

DEVICE = torch.device("cuda", 0)


class FakeCuda:
    """The part of ``torch.cuda`` that the backend calls."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.stream_id, self.pools = 7, 0
        self.invalid = False
        cuda = self

        class Stream:
            def __init__(self, device: Any = None, number: int = 0) -> None:
                self.cuda_stream = number

            def wait_stream(self, other: Any) -> None:
                cuda.log.append("wait")

        class CUDAGraph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                cuda.log.append(("begin", pool, capture_error_mode))

            def capture_end(self) -> None:
                cuda.log.append("end")
                if cuda.invalid:
                    raise RuntimeError("capture invalidated")

            def replay(self) -> None:
                cuda.log.append("replay")

        self.Stream, self.CUDAGraph = Stream, CUDAGraph

    def current_stream(self, device: Any) -> Any:
        return self.Stream(number=self.stream_id)

    def is_current_stream_capturing(self) -> bool:
        return self.stream_id < 0

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    stream = staticmethod(contextlib.nullcontext)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(graph_backend.torch, "cuda", fake)
    end = lambda device, pool: fake.log.append(("abandoned", device, pool))  # noqa: E731
    monkeypatch.setattr(torch_internals.torch._C, "_cuda_endAllocateToPool", end, raising=False)
    random = lambda device: fake.log.append(("random numbers", device))  # noqa: E731
    monkeypatch.setattr(graph_backend, "end_random_capture", random)
    return fake


def test_capture_does_not_run_and_replay_does(cuda: FakeCuda) -> None:
    output = torch.ones(1)
    replay = CudaGraphs().capture(lambda: output, DEVICE)
    assert cuda.log == ["wait", ("begin", (0, 1), "thread_local"), "end", "wait"]
    assert replay() is output
    assert cuda.log[-1] == "replay"


def test_graphs_of_a_stream_share_a_pool_until_released(cuda: FakeCuda) -> None:
    backend, pools = CudaGraphs(), []
    for stream in (7, 7, 8, 7):
        cuda.stream_id = stream
        backend.capture(lambda: torch.ones(1), DEVICE)
    backend.release()
    backend.capture(lambda: torch.ones(1), DEVICE)
    pools = [entry[1][1] for entry in cuda.log if entry[0] == "begin"]
    assert pools == [1, 1, 2, 1, 3]


def fails() -> torch.Tensor:
    raise ValueError("in the body")


@pytest.mark.parametrize("invalid", [False, True])
def test_a_failing_body_ends_its_capture(cuda: FakeCuda, invalid: bool) -> None:
    backend = CudaGraphs()
    cuda.invalid = invalid
    with pytest.raises(ValueError, match="in the body"):
        backend.capture(fails, DEVICE)
    assert "end" in cuda.log
    for undone in (("abandoned", 0, (0, 1)), ("random numbers", DEVICE)):
        assert (undone in cuda.log) == invalid
    cuda.invalid = False
    backend.capture(lambda: torch.ones(1), DEVICE)
    assert ("begin", (0, 2), "thread_local") in cuda.log  # the first pool is in doubt


def test_a_capture_that_cannot_end(cuda: FakeCuda) -> None:
    cuda.invalid = True
    with pytest.raises(RuntimeError, match="invalidated"):
        CudaGraphs().capture(lambda: torch.ones(1), DEVICE)
    assert cuda.log[-2:] == [("abandoned", 0, (0, 1)), ("random numbers", DEVICE)]


def test_context_is_the_stream(cuda: FakeCuda) -> None:
    assert CudaGraphs().context(DEVICE) == 7
    cuda.stream_id = -1
    assert CudaGraphs().context(DEVICE) is None
