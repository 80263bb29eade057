"""Small models on the device whose captured and replayed decode steps are counted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import kvquant_compile
from kvquant_compile.runtime.graph_backend import Body, CudaGraphs
from kvquant_compile.runtime.installed import installed
from tests.runtime.recording import Recording
from tests.zoo import tiny, tokens

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "sliding_window": 64},
    "gpt_neox": {},
}
LENGTH = 200 if CUDA else 12


class Counting(CudaGraphs):
    """CUDA graphs, counted."""

    captures = replays = 0

    def capture(self, body: Body, device: torch.device) -> Body:
        """Count, and capture."""
        self.captures += 1
        replay = super().capture(body, device)

        def counted() -> Tensor:
            self.replays += 1
            return replay()

        return counted


def optimised(name: str) -> Any:
    """A small random model at 3 bits, and what captures its steps."""
    shape = {"hidden_size": 256, "intermediate_size": 512, **SHAPES[name]}
    model = tiny(name, max_position_embeddings=4096, **shape).to(DEVICE, torch.bfloat16)
    kvquant_compile.optimize(model, bits=3, calibration=tokens(4, 64, seed=7), progress=False)
    state = installed(model)
    backend = Counting() if CUDA else Recording()
    state.decode = type(state.decode)(state.program, state.warn_once, backend)
    return model


def padded(batch: int) -> dict[str, Tensor]:
    """A prompt of 40 tokens; rows 1 and 2 of a batch start with padding."""
    mask = torch.ones(batch, 40, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, : 13 * row] = 0
    return {"input_ids": tokens(batch, 40).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def generate(model: Any, batch: int, count: int = LENGTH, **options: Any) -> Tensor:
    return model.generate(
        **padded(batch), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0, **options,
    )  # fmt: skip


@contextlib.contextmanager
def switched(model: Any, enabled: bool) -> Iterator[Any]:
    """Graphs on or off; yields the counting backend."""
    kvquant_compile.use_cuda_graphs(model, enabled)
    backend = installed(model).decode._backend
    backend.captures = backend.replays = 0
    try:
        yield backend
    finally:
        kvquant_compile.use_cuda_graphs(model, True)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return result, time.perf_counter() - start


def same_text(expected: Tensor, got: Tensor) -> str:
    """Empty, or where two texts first differ."""
    different = (expected != got).nonzero()
    return "" if len(different) == 0 else f"differs first at (row, token) {different[0].tolist()}"


def steps(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits after feeding ids [B, S] one column at a time, without a mask."""
    with torch.no_grad():
        for i in range(ids.shape[1]):
            logits = model(ids[:, i : i + 1], past_key_values=cache).logits
    return logits


def prompt(model: Any, batch: int = 1, seed: int = 0, length: int = 40) -> Any:
    with torch.no_grad():
        ids = tokens(batch, length, seed=seed).to(DEVICE)
        return model(ids, use_cache=True).past_key_values


def failure(model: Any) -> str:
    return kvquant_compile.explain(model).decode_step
