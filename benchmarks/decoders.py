"""Whole decode steps of the original model and of ours, on caches filled with random tokens.

Every contender is a generator: it yields None once when everything that takes a CPU long is done
(building, capturing, compiling), and then a row for every setting. Rows may so be measured one
at a time while the next contenders were prepared in parallel.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

from benchmarks.measure import failure
from benchmarks.models import cache_bytes, random_llama
from benchmarks.synthetic import filled_cache, random_artifact
from kvquant_compile.codec.spec import CodecSpec

WARM = 4
Row = dict[str, Any]
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        contender: key of :data:`CONTENDERS`.
        shape: of :data:`benchmarks.models.SHAPES`; ``layers`` overrides its depth.
        settings: (batch, cached tokens) in the order they are measured.
        steps: timed decode steps.
        device: where.
        spec: format of ours.
    """

    contender: str
    shape: str
    settings: tuple[tuple[int, int], ...]
    steps: int
    device: str
    spec: CodecSpec
    layers: int | None = None

    @property
    def room(self) -> int:
        """Tokens that will be appended, all loops together."""
        return 3 * (WARM + self.steps)


def dynamic(job: Job) -> Iterator[Row | None]:
    """The original, eager, with transformers' default cache (keys and values are concatenated)."""
    model = _model(job)
    yield None
    for batch, tokens in job.settings:
        yield _dense(job, model, DynamicCache(config=model.config), batch, tokens)
        release()


def static(job: Job) -> Iterator[Row | None]:
    """The original with a static cache, its forward compiled in mode "reduce-overhead"."""
    model = _model(job)
    (batch, tokens), *rest = job.settings
    assert not rest, "one process compiles for one size"
    length = -(-(tokens + job.room) // 64) * 64
    cache = StaticCache(config=model.config, max_cache_len=length)
    fill(cache, model, batch, tokens)
    compiled = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)

    def step(ids: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return _call(compiled, ids, cache).clone()

    start = time.perf_counter()
    _loop(step, _first(model, batch), WARM)
    compiling = round(time.perf_counter() - start, 1)
    yield None
    yield timed(job, batch, tokens, step) | {"compile_seconds": compiling}


def quantised(job: Job) -> Iterator[Row | None]:
    """The original with transformers' own quantised cache, every back end that is installed."""
    model = _model(job)
    yield None
    for batch, tokens in job.settings:
        for backend, options in backends().items():
            name = {"contender": f"transformers {backend} cache"}
            try:
                cache = QuantizedCache(backend, model.config, **options)
                yield _dense(job, model, cache, batch, tokens) | name
            except Exception as error:
                yield _row(job, batch, tokens) | name | {"error": failure(error)}
            cache = None
            release()


def backends() -> dict[str, dict[str, Any]]:
    """Back ends of transformers' quantised cache that can run here, with their options."""
    found: dict[str, dict[str, Any]] = {"fp8": {}}
    if importlib.util.find_spec("hqq"):
        found["hqq"] = {"nbits": 4, "axis_key": 1, "axis_value": 1}
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        found["quanto"] = {"nbits": 4}
    return found


def _dense(job: Job, model: Any, cache: Any, batch: int, tokens: int) -> Row:
    fill(cache, model, batch, tokens)
    return timed(job, batch, tokens, lambda ids: _call(model, ids, cache))


def ours(job: Job) -> Iterator[Row | None]:
    """The optimised model, with CUDA graphs (as it comes) and without."""
    import kvquant_compile

    model = _model(job)
    tables = random_artifact(model, job.spec)
    start = time.perf_counter()
    kvquant_compile.optimize(model, calibration=tables, progress=False)
    optimising = {"optimise_seconds": round(time.perf_counter() - start, 1)}
    for _ in _ours(job, model, 1, 200):  # compiles kernels
        pass
    yield None
    for batch, tokens in job.settings:
        for row in _ours(job, model, batch, tokens):
            yield row | optimising
        release()


def _ours(job: Job, model: Any, batch: int, tokens: int) -> Iterator[Row]:
    """One setting; nothing of its cache is left when it ends."""
    import kvquant_compile

    reset_peak()
    cache = kvquant_compile.new_cache(model)
    filled_cache(cache, batch, tokens, job.room)
    filled = {"fill_peak_bytes": peak_bytes(), "cache_bytes": cache.nbytes()}
    for graphs in (True, False):
        kvquant_compile.use_cuda_graphs(model, graphs)
        row = timed(job, batch, tokens, lambda ids: _call(model, ids, cache))
        how = {
            "contender": "ours" if graphs else "ours, no CUDA graph",
            "decode_step": kvquant_compile.explain(model).decode_step,
        }
        yield row | filled | how


CONTENDERS = {
    "ours": ours,
    "static": static,
    "dynamic": dynamic,
    "quantised": quantised,
}


def fill(cache: Any, model: Any, batch: int, tokens: int) -> None:
    """Random keys and values of ``tokens`` tokens in a transformers cache, layer by layer."""
    config = model.config
    heads, dim = config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        k, v = (
            torch.randn(batch, heads, tokens, dim, device=model.device, dtype=model.dtype)
            for _ in "kv"
        )
        cache.update(k, v, layer)


def timed(job: Job, batch: int, tokens: int, step: Step) -> Row:
    """Rate of greedy decoding, the model's own ``forward`` once a token, and peak memory."""
    ids = torch.ones(batch, 1, dtype=torch.int64, device=job.device)
    ids = _loop(step, ids, WARM)
    reset_peak()
    _synchronise()
    start = time.perf_counter()
    ids = _loop(step, ids, job.steps)
    _synchronise()
    seconds = (time.perf_counter() - start) / job.steps
    return _row(job, batch, tokens) | {
        "ms": round(seconds * 1e3, 4),
        "tokens_per_second": round(batch / seconds, 2),
        "peak_bytes": peak_bytes(),
    }


@torch.no_grad()
def _loop(step: Step, ids: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        ids = step(ids)[:, -1:].argmax(-1)
    return ids


def _call(run: Any, ids: Tensor, cache: Any) -> Tensor:
    return run(input_ids=ids, past_key_values=cache, use_cache=True).logits


def _model(job: Job) -> Any:
    return random_llama(job.shape, torch.device(job.device), job.layers)


def _first(model: Any, batch: int) -> Tensor:
    return torch.ones(batch, 1, dtype=torch.int64, device=model.device)


def _row(job: Job, batch: int, tokens: int) -> Row:
    return {
        "shape": job.shape, "contender": job.contender, "batch": batch, "tokens": tokens,
        "dense_cache_bytes": cache_bytes(job.shape, tokens, batch),
    }  # fmt: skip


def peak_bytes() -> int:
    """Most bytes that torch held on the device since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def reset_peak() -> None:
    """Begin anew with :func:`peak_bytes`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Give what a setting has left back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
