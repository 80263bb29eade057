"""Time to first token of a Llama-shaped model with random weights, ours against the original.

    python -m benchmarks.prefill_model --tokens 32768 --out docs/results/prefill-h200.json

Both run their ordinary ``forward`` on the whole prompt and return the last token's logits; the
original through SDPA's flash attention. Calls alternate, so that both see the same clocks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import DEFAULT, FORMATS
from benchmarks.decoders import peak_bytes, release, reset_peak
from benchmarks.measure import environment, failure, save, wall_seconds
from benchmarks.models import SHAPES, random_llama
from benchmarks.synthetic import random_artifact


@torch.no_grad()
def first_token(model: Any, ids: torch.Tensor) -> None:
    """Prefill into a fresh cache, up to the next token's logits."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


def measure(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, Any]]:
    """Alternate the calls and report medians of wall time, all times, and peak memory."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, int] = {}
    errors: dict[str, str] = {}
    for _ in range(1 + repeats):  # the first of each compiles
        for name, call in calls.items():
            if name in errors:
                continue
            release()
            reset_peak()
            try:
                times[name] += wall_seconds(call, 1)
            except Exception as error:
                errors[name] = failure(error)
            peaks[name] = peak_bytes()
    out: dict[str, dict[str, Any]] = {}
    for name, (first, *rest) in ((n, t or [0.0]) for n, t in times.items()):
        if name in errors or not rest:
            out[name] = {"error": errors.get(name, "no repetition")}
            continue
        out[name] = {
            "seconds": statistics.median(rest), "all": rest, "first_call_seconds": first,
            "peak_bytes": peaks[name],
        }  # fmt: skip
    return out


def run(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Both contenders at one length; two models share weights, so only one is optimised."""
    import kvquant_compile

    device = torch.device(args.device)
    original = random_llama(args.shape, device, args.layers)
    optimised = random_llama(args.shape, torch.device("meta"), args.layers)
    optimised.load_state_dict(original.state_dict(), assign=True)
    optimised.model.rotary_emb = original.model.rotary_emb
    spec = next(f.spec for f in FORMATS if f.name == args.format)
    kvquant_compile.optimize(
        optimised, calibration=random_artifact(optimised, spec), progress=False
    )
    ids = torch.randint(3, SHAPES[args.shape]["vocab_size"], (args.batch, tokens), device=device)
    calls = {
        "original": lambda: first_token(original, ids),
        "ours": lambda: first_token(optimised, ids),
    }
    return {"tokens": tokens, "batch": args.batch, "results": measure(calls, args.repeats)}


def main() -> None:
    """Every length in turn."""
    args = _arguments()
    record: dict[str, Any] = {
        "environment": environment(), "shape": args.shape, "format": args.format,
        "notes": ["random tables with error feedback"], "rows": [],
    }  # fmt: skip
    table = Table(title=f"time to first token, {args.shape}", title_justify="left")
    for name in ("tokens", "batch", "contender", "seconds", "peak GB", "note"):
        table.add_column(name)
    for tokens in args.tokens:
        row = run(args, tokens)
        record["rows"].append(row)
        save(args.out, record)
        for name, result in row["results"].items():
            cells = [f"{result['seconds']:.4f}", f"{result['peak_bytes'] / 1e9:.1f}"]
            cells = ["", ""] if "error" in result else cells
            lead = (f"{tokens:,}", str(args.batch), name)
            table.add_row(*lead, *cells, result.get("error", ""))
        release()
    Console(width=args.width).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--format", default=DEFAULT.name, choices=[f.name for f in FORMATS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--width", type=int, default=120)
    return parser.parse_args()


if __name__ == "__main__":
    main()
