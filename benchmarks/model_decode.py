"""Whole decode steps of a Llama-shaped model with random weights: tokens per second, peak memory.

    python -m benchmarks.model_decode --settings 1x8192 1x32768 1x131072 16x8192 --out FILE
    python -m benchmarks.model_decode --shape llama-7b --settings 1x1000000 --contenders ours

Contenders run in processes of their own. As many as fit into the device's memory are prepared at
the same time (compilation takes a CPU half a minute each), then measured one after the other.
Caches are filled with random tokens; there is no prefill, and no time of one is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import DEFAULT, FORMATS
from benchmarks.decoders import CONTENDERS, Job, backends
from benchmarks.measure import environment, failure, save
from benchmarks.models import SHAPES, cache_bytes

SPARE = 4e9
"""Bytes of a process beside its weights and cache: context, kernels, activations, graphs."""
PATIENCE = 300.0
"""Seconds that processes wait for one another."""


def work(job: Job, ready: Any, turn: Any, rows: Any) -> None:
    """Prepare, wait for the others of the wave, and measure while nobody else does."""
    steps, error = CONTENDERS[job.contender](job), None
    try:
        next(steps)
    except Exception as caught:
        error = caught
    with contextlib.suppress(threading.BrokenBarrierError):
        ready.wait(PATIENCE)
    turn.acquire(timeout=PATIENCE)
    try:
        if error is not None:
            raise error
        for row in steps:
            rows.put(row)
    except Exception as caught:
        rows.put(_failed(job, failure(caught)))
    turn.release()
    rows.put(None)


def _failed(job: Job, error: str) -> dict[str, Any]:
    return {"contender": job.contender, "shape": job.shape, "settings": job.settings,
            "error": error}  # fmt: skip


def run_wave(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Rows of jobs that fit on the device together, as they come."""
    context = multiprocessing.get_context("spawn")
    ready, turn, rows = context.Barrier(len(jobs)), context.Lock(), context.Queue()
    processes = {context.Process(target=work, args=(job, ready, turn, rows)): job for job in jobs}
    for process in processes:
        process.start()
    left, dead = len(jobs), set()
    while left:
        try:
            row = rows.get(timeout=5)
        except queue.Empty:
            fallen = [p for p in processes if p.exitcode and p not in dead]
            for process in fallen:  # by the system, or it would have reported
                ready.abort()
                dead.add(process)
                yield _failed(processes[process], f"exit code {process.exitcode}")
            left -= len(fallen)
            continue
        left -= row is None
        if row is not None:
            yield row
    for process in processes:
        process.join()


def waves(jobs: Sequence[Job], budget: float) -> list[list[Job]]:
    """Jobs grouped in order so that each group fits into ``budget`` bytes."""
    out: list[list[Job]] = []
    free = 0.0
    for job in sorted(jobs, key=needed_bytes):
        need = needed_bytes(job)
        if not out or need > free:
            out.append([])
            free = budget
        out[-1].append(job)
        free -= need
    return out


def needed_bytes(job: Job) -> float:
    """Estimate of a job's peak on the device."""
    bits = effective_bits(job) if job.contender == "ours" else 16
    largest = max(cache_bytes(job.shape, n, b, bits) for b, n in job.settings)
    layers = SHAPES[job.shape]["num_hidden_layers"]
    copies = 0.0 if job.contender == "ours" else 8 * largest / layers
    return weight_bytes(job.shape) + largest + copies + SPARE


def effective_bits(job: Job) -> float:
    """Effective bits an element, with a scale and zero point a value token and the slots."""
    s = job.spec
    extra = 32 + 24 * (s.key_slots + s.value_slots) + 16 * int(s.key_token_scale)
    return (s.key_bits + s.value_bits) / 2 + extra / 256


def weight_bytes(shape: str) -> float:
    s = SHAPES[shape]
    hidden, heads = s["hidden_size"], s["num_attention_heads"]
    attention = hidden * hidden * (2 + 2 * s["num_key_value_heads"] / heads)
    layer = attention + 3 * hidden * s["intermediate_size"]
    return 2 * (s["num_hidden_layers"] * layer + 2 * hidden * s["vocab_size"])


def render(rows: Sequence[dict[str, Any]]) -> Table:
    """Tokens per second and memory of every contender and setting."""
    table = Table(title="whole decode steps", title_justify="left")
    for name in ("contender", "batch", "context", "ms", "tokens/s", "peak GB", "cache GB", "note"):
        table.add_column(name, justify="left" if name in ("contender", "note") else "right")
    for row in rows:
        cells = [row["contender"]]
        cells += [f"{row[k]:,}" if k in row else "" for k in ("batch", "tokens")]
        cells += [f"{row[k]:,.2f}" if k in row else "" for k in ("ms", "tokens_per_second")]
        cells += [f"{row[k] / 1e9:.1f}" if k in row else "" for k in ("peak_bytes", "cache_bytes")]
        table.add_row(*cells, row.get("error", row.get("decode_step", "")))
    return table


def main() -> None:
    """Run all jobs, wave by wave."""
    args = _arguments()
    settings = [tuple(map(int, text.split("x"))) for text in args.settings]
    spec = next(f.spec for f in FORMATS if f.name == args.format)

    def job(contender: str, chosen: Sequence[Any]) -> Job:
        return Job(contender, args.shape, tuple(chosen), args.steps, args.device, spec,
                   args.layers)  # fmt: skip

    jobs = []
    for contender in args.contenders:
        apart = contender == "static"
        jobs += [job(contender, g) for g in ([[s] for s in settings] if apart else [settings])]
    record = {
        "environment": environment() | {"transformers_caches": list(backends())},
        "steps": args.steps, "format": args.format, "spec": asdict(spec),
        "notes": ["random tables with error feedback"], "rows": [],
    }  # fmt: skip
    if args.append and args.out and args.out.exists():
        record["rows"] = json.loads(args.out.read_text())["rows"]
    budget = 1e18
    if args.device == "cuda":
        budget = 0.94 * torch.cuda.get_device_properties(0).total_memory
    start = time.perf_counter()
    for wave in waves(jobs, budget):
        print("wave:", [(j.contender, j.settings) for j in wave], flush=True)
        for row in run_wave(wave):
            print(f"{time.perf_counter() - start:.0f} s: {row}", flush=True)
            record["rows"].append(row)
            save(args.out, record)
    Console(width=args.width).print(render(record["rows"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--settings", nargs="+", help="BATCHxTOKENS",
                        default=["1x8192", "1x32768", "1x131072", "16x8192"])  # fmt: skip
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--format", default=DEFAULT.name, choices=[f.name for f in FORMATS])
    parser.add_argument("--steps", type=int, default=32, help="timed decode steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--append", action="store_true", help="keep the rows of the JSON")
    parser.add_argument("--width", type=int, default=140)
    return parser.parse_args()


if __name__ == "__main__":
    main()
