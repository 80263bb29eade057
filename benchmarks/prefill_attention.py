"""Attention of a chunk of new tokens over a quantised history, against 16-bit attention.

    python -m benchmarks.prefill_attention --out docs/results/prefill-attention-h200.json

32 query and 8 kv heads of 128 channels, one sequence. ``flash`` is torch's flash kernel with a
causal mask at the lower right, over keys and values that are held in bfloat16; ``cudnn``, which
has no such mask, attends to the history and to the chunk in two calls whose results stay apart.
Times are medians of calls that are waited for; dequantisation alone is a CUDA graph's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.cases import DEFAULT, plain
from benchmarks.measure import Call, environment, failure, graph_seconds, save, wall_seconds
from benchmarks.synthetic import fill_exact, fill_pages
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import PAGE_TOKENS, CodecSpec
from kvquant_compile.lowering.attend import CacheView, Site
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.lowering.triton import attend as kernels
from kvquant_compile.lowering.triton.dequantise import TOKENS, Workspace, dequantise
from kvquant_compile.lowering.triton.flash import Tiling, flash
from kvquant_compile.lowering.triton.prefill import block_tokens
from kvquant_compile.plan import AttendPlan, LayerPlan
from tests.lowering.reference import half_rope
from tests.triton.cases import random_tables

HEADS, REP, DIM = 8, 4, 128
SCALE = DIM**-0.5
DTYPE = torch.bfloat16
FORMATS = {
    "3 bits, default": DEFAULT.spec,
    "3 bits, plain": plain(3),
}
SITES = {
    "": Site(SCALE, 0.0, 0, None),
    ", window 4096": Site(SCALE, 0.0, 4096, None),
    ", soft-cap": Site(SCALE, 30.0, 0, None),
}
TILINGS = (
    Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 3), Tiling(128, 64, 4, 3), Tiling(128, 128, 8, 2),
    Tiling(128, 32, 4, 4), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """New tokens, and tokens before them."""

    chunk: int
    history: int

    @property
    def operations(self) -> float:
        """Multiplications and additions of exact causal attention."""
        seen = self.chunk * self.history + self.chunk * (self.chunk + 1) / 2
        return 4.0 * HEADS * REP * DIM * seen


def seconds(call: Call, budget: float = 0.1) -> float:
    """Median of warm calls, the device's work included."""
    once = min(wall_seconds(call, 3))
    return statistics.median(wall_seconds(call, max(3, min(20, int(budget / once)))))


def random_cache(spec: CodecSpec, size: Size, device: torch.device) -> CacheView:
    """A cache of random pages with room for the chunk."""
    plan = LayerPlan(
        0, HEADS, DIM, DIM, half_rope(DIM, DIM, 5e5), (AttendPlan(HEADS * REP, SCALE),)
    )
    tables = random_tables(spec, HEADS, DIM, DIM, torch.Generator().manual_seed(0))
    constants = lower_layer(plan, spec, tables, DTYPE, device)
    layout = constants.layout
    count = -(-(size.chunk + size.history) // PAGE_TOKENS)
    pages = torch.empty(count, HEADS, layout.page_bytes, dtype=torch.uint8, device=device)
    generator = torch.Generator(device).manual_seed(1)
    fill_pages(pages, layout, generator)
    where: dict[str, Any] = {"device": device, "dtype": torch.int32}
    rows = (1, HEADS, layout.exact_rows, layout.exact_width)
    sinks = torch.empty(rows, device=device, dtype=DTYPE)
    fill_exact(sinks, layout, size.chunk + size.history, generator)
    arguments, geometry = constants.arguments()
    return CacheView(
        torch.arange(count, **where)[None], torch.arange(count * PAGE_TOKENS, **where)[None],
        [pages], sinks, arguments, geometry, str(layout),
    )  # fmt: skip


def step(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value of the chunk, slots and history."""
    q, k, v = (
        torch.randn(1, size.chunk, n, DIM, device=device, dtype=DTYPE).transpose(1, 2)
        for n in (HEADS * REP, HEADS, HEADS)
    )
    slots = torch.arange(size.chunk, device=device, dtype=torch.int32)[None] + size.history
    return q, k, v, slots, slots[:, 0].contiguous()


def ours(spec: CodecSpec, site: Site, size: Size, device: torch.device) -> float:
    """Seconds of ``kvquant::attend`` through the kernels."""
    q, k, v, slots, history = step(size, device)
    cache = random_cache(spec, size, device)
    return seconds(partial(kernels.attend, q, k, v, slots, history, cache, site, True))


def peer(backend: SDPBackend, size: Size, device: torch.device) -> float:
    """Seconds of torch's attention over a 16-bit cache."""
    q, _, _, _, _ = step(size, device)
    total = size.chunk + size.history
    k, v = (torch.randn(1, HEADS, total, DIM, device=device, dtype=DTYPE) for _ in "kv")
    past, own = slice(0, size.history), slice(size.history, total)

    def call() -> None:
        with sdpa_kernel(backend):
            if size.history and backend == SDPBackend.FLASH_ATTENTION:
                mask = causal_lower_right(size.chunk, total)
                sdpa(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)
                return
            if size.history:
                sdpa(q, k[:, :, past], v[:, :, past], scale=SCALE, enable_gqa=True)
            sdpa(q, k[:, :, own], v[:, :, own], is_causal=True, scale=SCALE, enable_gqa=True)

    return seconds(call)


def dequantisation(spec: CodecSpec, program: int, device: torch.device) -> dict[str, float]:
    """Microseconds of one block, and gigabytes read and written a second, with so many tokens a
    program."""
    tokens = block_tokens(1)
    cache = random_cache(spec, Size(0, tokens), device)
    space = Workspace.empty(cache, tokens, torch.empty(0, device=device, dtype=DTYPE))
    limit = torch.tensor([tokens], dtype=torch.int32, device=device)
    time = graph_seconds([partial(dequantise, cache, limit, 0, space, program)])
    layout: PageLayout = cache.layout
    moved = tokens // PAGE_TOKENS * HEADS * layout.page_bytes
    moved += space.keys.nbytes + space.values.nbytes
    return {
        "tokens": tokens,
        "program": program,
        "us": time * 1e6,
        "gigabytes_per_second": moved / time / 1e9,
    }


def tilings(device: torch.device) -> Iterator[dict[str, Any]]:
    """Our flash kernel on one block, by tile sizes; the first is the one in use."""
    size = Size(2048, block_tokens(1))
    q, _, _, slots, limit = step(size, device)
    k, v = (torch.randn(1, HEADS, size.history, DIM, device=device, dtype=DTYPE) for _ in "kv")
    places = torch.arange(size.history, device=device, dtype=torch.int32)[None]
    operations = 4.0 * HEADS * REP * DIM * size.chunk * size.history
    for tiles in TILINGS:
        row: dict[str, Any] = {"tiling": str(tiles)}
        try:
            call = partial(flash, q, k, v, slots, places, limit, SITES[""], 0, True, tiles)
            time = seconds(call)
            yield row | {"us": time * 1e6, "teraflops": operations / time / 1e12}
        except Exception as error:
            yield row | {"error": failure(error)}


def contenders() -> dict[str, Callable[[Size, torch.device], float]]:
    """What is measured at every size, the peers first."""
    out: dict[str, Callable[[Size, torch.device], float]] = {
        "flash bf16": partial(peer, SDPBackend.FLASH_ATTENTION),
        "cudnn bf16": partial(peer, SDPBackend.CUDNN_ATTENTION),
    }
    for name, spec in FORMATS.items():
        out[name] = partial(ours, spec, SITES[""])
    for name, site in SITES.items():
        if name:
            out[f"3 bits, default{name}"] = partial(ours, FORMATS["3 bits, default"], site)
    return out


def measure(size: Size, device: torch.device) -> dict[str, Any]:
    """All contenders at one size: microseconds, and ours as a share of the flash kernel's speed."""
    row: dict[str, Any] = {"chunk": size.chunk, "history": size.history}
    for name, contender in contenders().items():
        try:
            time = contender(size, device)
            row[name] = {"us": time * 1e6, "teraflops": size.operations / time / 1e12}
        except Exception as error:
            row[name] = {"error": failure(error)}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    times = [row[n]["us"] for n in ("flash bf16", "cudnn bf16") if "us" in row[n]]
    for name in FORMATS:
        if "us" in row[name] and "us" in row["flash bf16"]:
            row[name]["of_flash"] = row["flash bf16"]["us"] / row[name]["us"]
            row[name]["of_best"] = min(times) / row[name]["us"]
    return row


def main() -> None:
    """Print a JSON line for everything measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chunks", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--history", type=int, nargs="*", default=[0, 32768, 131072])
    parser.add_argument("--tilings", action="store_true", help="try sizes of tiles and programs")
    args = parser.parse_args()
    device = torch.device("cuda")
    rows: list[dict[str, Any]] = []
    programs = (8, 16, 32, 64) if args.tilings else (TOKENS,)
    for (name, spec), program in itertools.product(FORMATS.items(), programs):
        rows.append({"dequantise": name, **dequantisation(spec, program, device)})
        print(json.dumps(rows[-1]), flush=True)
    if args.tilings:
        for row in tilings(device):
            rows.append(row)
            print(json.dumps(row), flush=True)
    for chunk in args.chunks:
        for history in args.history:
            rows.append(measure(Size(chunk, history), device))
            print(json.dumps(rows[-1]), flush=True)
            save(args.out, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
