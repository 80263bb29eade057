"""Decode attention over a quantised cache against 16-bit and FP8 peers, in one run.

    python -m benchmarks.decode_attention --out results.json

Times are medians of CUDA-graph replays, inputs rotated so that short caches do not sit in the
L2 cache by accident. Ratios are peer time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.attend import CacheView, Site
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.lowering.triton import attend as kernels
from kvquant_compile.lowering.triton.dispatch import SWITCH
from kvquant_compile.plan import AttendPlan, LayerPlan
from tests.lowering.reference import half_rope
from tests.triton.cases import random_pages, random_tables

CUDA = torch.device("cuda")
FORMATS = {
    "3 bit": CodecSpec(3, 3, 0, 0, False, 1),
    "3 bit + slots + token scale": CodecSpec(3, 3, 1, 1, True, 1),
    "2 bit": CodecSpec(2, 2, 0, 0, False, 1),
    "4 bit": CodecSpec(4, 4, 0, 0, False, 1),
}


def ours(spec: CodecSpec, heads: int, rep: int, tokens: int, rope: bool = True) -> Callable:
    """A call of the attend kernels on a random cache, positions on the device."""
    g = torch.Generator(CUDA).manual_seed(1)
    plan = LayerPlan(0, heads, 128, 128, half_rope(128, 128, 5e5) if rope else None,
                     (AttendPlan(heads * rep, 128**-0.5),))  # fmt: skip
    tables = random_tables(spec, heads, 128, 128, torch.Generator().manual_seed(0))
    constants = lower_layer(plan, spec, tables, torch.float16, CUDA)
    count = -(-(tokens + 1) // 64)
    pages = torch.cat([random_pages(constants.layout, min(2048, count - i), g)
                       for i in range(0, count, 2048)])  # fmt: skip
    args, geometry = constants.arguments()
    sinks = torch.randn(1, heads, spec.sink_tokens, 256, device=CUDA, dtype=torch.float16)
    cache = CacheView(
        torch.arange(count, device=CUDA, dtype=torch.int32)[None],
        torch.arange(count * 64, device=CUDA, dtype=torch.int32)[None],
        [pages], sinks, args, geometry, str(constants.layout),
    )  # fmt: skip
    q = torch.randn(1, heads * rep, 1, 128, device=CUDA, dtype=torch.float16)
    k, v = (torch.randn(1, heads, 1, 128, device=CUDA, dtype=torch.float16) for _ in range(2))
    slots = torch.tensor([[tokens]], device=CUDA, dtype=torch.int32)
    history = torch.tensor([tokens], device=CUDA, dtype=torch.int32)
    site = Site(128**-0.5, 0.0, 0, None)
    return lambda: kernels.attend(q, k, v, slots, history, cache, site, True)


def sdpa(heads: int, rep: int, tokens: int, dtype: torch.dtype, backend: SDPBackend) -> Callable:
    """A call of torch's attention on a 16-bit cache."""
    q = torch.randn(1, heads * rep, 1, 128, device=CUDA, dtype=dtype)
    k, v = (torch.randn(1, heads, tokens, 128, device=CUDA, dtype=dtype) for _ in range(2))

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=rep > 1)

    return call


def flex(heads: int, rep: int, tokens: int) -> Callable:
    """A call of compiled FlexAttention on a bfloat16 cache."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    q = torch.randn(1, heads * rep, 1, 128, device=CUDA, dtype=torch.bfloat16)
    k, v = (torch.randn(1, heads, tokens, 128, device=CUDA, dtype=torch.bfloat16) for _ in "kv")
    return lambda: compiled(q, k, v, enable_gqa=rep > 1)


def fp8(heads: int, rep: int, tokens: int) -> Callable:
    """A call of the FP8 baseline."""
    from benchmarks.fp8_baseline import Fp8Decode

    k, v = (torch.randn(heads, tokens, 128, device=CUDA, dtype=torch.float16).to(
        torch.float8_e4m3fn) for _ in "kv")  # fmt: skip
    return Fp8Decode(torch.randn(heads * rep, 128, device=CUDA, dtype=torch.float16), k, v)


def seconds(call: Callable, target: float = 0.15) -> float:
    """Median seconds of a call, from replays of a graph that holds it several times."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    calls = 4
    with torch.cuda.graph(graph, stream=side):
        for _ in range(calls):
            call()
    times = []
    total = 0.0
    while total < target or len(times) < 5:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
        total += times[-1] * calls
    return sorted(times)[len(times) // 2]


def measure(name: str, make: Callable[[], Callable]) -> float | None:
    """Time one contender, or say why it cannot run."""
    try:
        call = make()
        return seconds(call)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return None
    finally:
        torch.cuda.empty_cache()


def run(heads: int, rep: int, tokens: int, names: list[str]) -> dict[str, Any]:
    """All contenders at one size; microseconds."""
    makers: dict[str, Callable[[], Callable]] = {
        "cudnn fp16": lambda: sdpa(heads, rep, tokens, torch.float16, SDPBackend.CUDNN_ATTENTION),
        "cudnn bf16": lambda: sdpa(heads, rep, tokens, torch.bfloat16, SDPBackend.CUDNN_ATTENTION),
        "flash bf16": lambda: sdpa(heads, rep, tokens, torch.bfloat16, SDPBackend.FLASH_ATTENTION),
        "flex bf16": lambda: flex(heads, rep, tokens),
        "fp8": lambda: fp8(heads, rep, tokens),
    }
    makers |= {n: (lambda s=s: ours(s, heads, rep, tokens)) for n, s in FORMATS.items()}
    makers["3 bit, no rope"] = lambda: ours(FORMATS["3 bit"], heads, rep, tokens, rope=False)
    row: dict[str, Any] = {"query_heads": heads * rep, "kv_heads": heads, "tokens": tokens}
    for name, make in makers.items():
        if names and not any(n in name for n in names):
            continue
        time = measure(name, make)
        row[name] = None if time is None else round(time * 1e6, 2)
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Run every size and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*",
                        default=[1024, 4096, 16384, 65536, 131072, 524288, 1048576])  # fmt: skip
    parser.add_argument("--heads", nargs="*", default=["8x4", "32x1"], help="kv heads x group")
    parser.add_argument("--only", nargs="*", default=[], help="contenders by part of their name")
    options = parser.parse_args()
    rows = []
    for shape in options.heads:
        heads, rep = map(int, shape.split("x"))
        sizes = [n for n in options.tokens if n * heads <= 8 * 1048576]
        rows += [run(heads, rep, n, options.only) for n in sizes]
    import triton

    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "unit": "microseconds", "rows": rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault(SWITCH, "triton")
    main()
