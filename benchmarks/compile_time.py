"""How long a model takes from ``optimize`` to its first tokens, all kernel caches empty.

    python -m benchmarks.compile_time --out docs/results/compile-h200.json

A process of its own has Triton's cache in an empty folder; the same again, with that folder as
the first process left it, is a warm start. Layers of one format share their kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import DEFAULT, FORMATS
from benchmarks.measure import environment, save
from benchmarks.models import SHAPES, random_llama
from benchmarks.synthetic import random_artifact


@torch.no_grad()
def stages(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of every stage: optimise, a prompt of 100 tokens, and single decode steps."""
    import kvquant_compile

    device = torch.device(args.device)
    spec = next(f.spec for f in FORMATS if f.name == args.format)
    out: dict[str, float] = {}

    def stage(name: str, call: Any) -> None:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        out[name] = round(time.perf_counter() - start, 3)
        print(f"{name}: {out[name]:.2f} s", file=sys.stderr, flush=True)

    start = time.perf_counter()
    model: Any = random_llama(args.shape, device, args.layers)
    tables = random_artifact(model, spec)
    print(f"model: {time.perf_counter() - start:.2f} s", file=sys.stderr, flush=True)
    stage("optimise", lambda: kvquant_compile.optimize(model, calibration=tables, progress=False))
    cache = kvquant_compile.new_cache(model)
    prompt = torch.ones(1, 100, dtype=torch.int64, device=device)
    stage("prompt", lambda: model(input_ids=prompt, past_key_values=cache))
    for name in ("first decode step", "second", "third", "fourth"):
        stage(name, lambda: model(input_ids=prompt[:, :1], past_key_values=cache))
    return out


def compiled_kernels(folder: Path) -> dict[str, int]:
    """Kernel name -> how many variants a Triton cache folder holds."""
    found: dict[str, int] = {}
    for path in folder.glob("*/*.cubin"):
        found[path.stem] = found.get(path.stem, 0) + 1
    return dict(sorted(found.items()))


def child(folder: str) -> dict[str, float]:
    """:func:`stages` in a process with this Triton cache, and its whole wall time."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_time", *sys.argv[1:], "--child"],
        env=os.environ | {"TRITON_CACHE_DIR": folder},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result | {"process": round(time.perf_counter() - start, 3)}


def main() -> None:
    """Cold, then warm."""
    args = _arguments()
    if args.child:
        print(json.dumps(stages(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        cold, kernels, warm = child(folder), compiled_kernels(Path(folder)), child(folder)
    layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    table = Table(title=f"{args.shape}, {layers} layers, seconds", title_justify="left")
    for name in ("stage", "empty cache", "warm"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name in cold:
        table.add_row(name, f"{cold[name]:.2f}", f"{warm[name]:.2f}")
    Console(width=100).print(table)
    print(f"{sum(kernels.values())} kernels compiled: {kernels}")
    save(args.out, {
        "environment": environment(), "shape": args.shape, "layers": layers,
        "format": args.format, "notes": ["random tables with error feedback"],
        "cold": cold, "warm": warm, "kernels": kernels,
    })  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--format", default=DEFAULT.name, choices=[f.name for f in FORMATS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
