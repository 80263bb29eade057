"""Decode attention over a quantised cache against 16-bit and FP8 peers, in one run.

    python -m benchmarks.decode_attention --groups grouped --out docs/results/decode-h200.json

All contenders of a row are set up and captured as CUDA graphs, then replayed in alternating rounds
(:mod:`benchmarks.rounds`), the device resting before each. Caches of up to 131072 tokens are
rotated, so that the L2 cache does not serve reads. Kernels are compiled before, in parallel
processes. A contender that fails leaves its error in the record and the others run on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import FORMATS, GROUPS, TINY, Size
from benchmarks.contenders import makers
from benchmarks.decode_row import measure
from benchmarks.measure import bandwidth, environment, failure, save
from benchmarks.rounds import Schedule

DENSE = ("cudnn bf16", "flash bf16", "flex bf16")


def compile_case(name: str, size: Size) -> None:
    """Build a contender and call it once, which leaves its kernels in the disk caches."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    contender = makers()[name](size, torch.device("cuda"))
    for calls in contender.settings().values():
        calls[0]()
    torch.cuda.synchronize()
    del contender, calls
    torch.cuda.empty_cache()


def compile_tasks(names: Sequence[str], sizes: Sequence[Size]) -> list[tuple[str, Size]]:
    """What to compile: FlexAttention, which takes longest, first; then size by size, so that a
    kernel that serves several is in the cache when its second size comes."""
    flex = [("flex bf16", s) for s in sizes if "flex bf16" in names]
    triton = [n for n in names if n == "fp8" or n in {form.name for form in FORMATS}]
    return flex + [(n, s) for s in sizes for n in triton]


def compile_all(names: Sequence[str], sizes: Sequence[Size], jobs: int) -> float:
    """Fill Triton's and Inductor's disk caches; returns the seconds it took.

    What fails here is only reported: it is compiled, or fails, again where it is measured.
    """
    start = time.perf_counter()
    tasks = compile_tasks(names, sizes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(jobs, len(tasks) or 1), mp_context=context) as pool:
        futures = {pool.submit(compile_case, *task): task for task in tasks}
        for future, (name, size) in futures.items():
            if error := future.exception():
                print(f"compiling {name}, {size.name}: {failure(error)}", flush=True)
    return time.perf_counter() - start


def render(rows: Sequence[dict[str, Any]], read: float) -> Table:
    """Microseconds, the ratio to the best bfloat16 peer, and the share of the read bandwidth."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(r["results"] for r in rows)))
    title = "microseconds (bf16 peer over ours; share of the read bandwidth)"
    table = Table(title=title, title_justify="left")
    for name in ["query/kv heads x tokens", *names]:
        table.add_column(name)
    for row in rows:
        times = [row["results"][n]["us"] for n in DENSE if "us" in row["results"].get(n, {})]
        cells = [_cell(row["results"].get(n, {}), min(times, default=0.0), read) for n in names]
        table.add_row(row["size"], *cells)
    return table


def _cell(result: dict[str, Any], peer: float, read: float) -> str:
    if "us" not in result:
        return "failed" if "error" in result else "-"
    notes = [f"{peer / result['us']:.2f}x"] if peer else []
    notes += [f"{100 * result['bytes_per_second'] / read:.0f} %"] if read else []
    return f"{result['us']:,.1f}" + (f" ({'; '.join(notes)})" if notes else "")


def release(device: torch.device) -> None:
    """Give the memory of a row back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Measure the sizes asked for and write JSON after each."""
    args = _arguments()
    device = torch.device(args.device)
    sizes = TINY if args.tiny else [s for g in args.groups for s in GROUPS[g]]
    sizes = [s for s in sizes if not args.tokens or s.tokens in args.tokens]
    names = [n for n in makers() if not args.only or any(part in n for part in args.only)]
    formats = {form.name: asdict(form.spec) for form in FORMATS}
    record: dict[str, Any] = {
        "environment": environment(), "unit": "microseconds", "formats": formats, "rows": [],
    }  # fmt: skip
    if args.append and args.out and args.out.exists():
        again = {size.name for size in sizes}
        old = json.loads(args.out.read_text())["rows"]
        record["rows"] = [row for row in old if row["size"] not in again]
    read = 0.0
    if device.type == "cuda":
        record["compile_seconds"] = round(compile_all(names, sizes, args.jobs), 1)
        record["bandwidth"] = bandwidth()
        read = record["bandwidth"]["read"]
    schedule = Schedule(
        args.rounds, slice_seconds=args.slice, pause_seconds=args.pause,
        sustained_seconds=args.sustained,
    )  # fmt: skip
    for size in sizes:
        start = time.perf_counter()
        results = measure(names, size, device, schedule)
        release(device)
        for name, result in results.items():
            if "error" in result:
                print(f"{size.name}, {name}: {result['error']}", flush=True)
        print(f"{size.name}: {time.perf_counter() - start:.1f} s", flush=True)
        row = {"size": size.name, **vars(size), "schedule": asdict(schedule), "results": results}
        record["rows"].append(row)
        save(args.out, record)
    Console(width=args.width).print(render(record["rows"], read))
    print({k: v for k, v in record.items() if k not in ("rows", "formats")})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--append", action="store_true", help="keep other sizes of the JSON")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="only these lengths")
    parser.add_argument("--only", nargs="*", default=[], help="contenders by part of their name")
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    parser.add_argument("--rounds", type=int, default=Schedule.rounds)
    parser.add_argument("--slice", type=float, default=Schedule.slice_seconds,
                        help="seconds of a contender in a round")  # fmt: skip
    parser.add_argument("--pause", type=float, default=Schedule.pause_seconds,
                        help="seconds without work before every slice")  # fmt: skip
    parser.add_argument("--sustained", type=float, default=Schedule.sustained_seconds,
                        help="seconds of a contender alone, after the rounds")  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two tiny sizes, for a CPU")
    parser.add_argument("--width", type=int, default=220, help="of the printed table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
