"""How long ``optimize`` takes, calibration included, with the default budget.

    python -m benchmarks.calibration_time --shape llama-7b --device cuda --out 7b.json
    python -m benchmarks.calibration_time --model MODEL --text TEXT --threads 2 --out small.json

A shape has random weights, and windows of random tokens unless the model samples its own
(``--sampled``): what they are does not change the work. Times are of the first call of a process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import kvquant_compile
from benchmarks.measure import environment, save
from benchmarks.models import SHAPES, random_llama
from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.evaluate.text import read_text
from kvquant_compile.loading import load_model


def given_data(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """What ``optimize`` is called with: tokens of the default number and length, or nothing."""
    if args.sampled:
        return None
    if args.text is not None:
        text = read_text(args.text)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    budget = CalibrationOptions().windows
    size = budget.windows, budget.tokens
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, size, generator=generator)


def measured(model: Any, data: Any, bits: int, device: torch.device) -> dict[str, Any]:
    """Seconds of one call, and the peak of the device's memory."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    kvquant_compile.optimize(model, bits, calibration=data, progress=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2)}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    details = kvquant_compile.artifact(model).details
    found["calibrated_on"] = {k: details[k] for k in ("source", "windows", "tokens")}
    kvquant_compile.restore(model)
    return found


def main() -> None:
    """Measure and record."""
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    tokenizer: Any = None
    if args.model is None:
        model: Any = random_llama(args.shape, device, args.layers)
    else:
        model, tokenizer = load_model(args.model, args.dtype)
        model.to(device)
    data = given_data(args, model, tokenizer)
    row = {
        "model": args.shape if args.model is None else Path(args.model).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": args.device,
        "threads": torch.get_num_threads(),
        "bits": args.bits,
        **measured(model, data, args.bits, device),
    }
    print(row, flush=True)
    if args.out is not None:
        known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
        save(args.out, {"environment": environment(), "rows": [*known, row]})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-7b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--model", help="a model folder instead of a shape")
    parser.add_argument("--dtype", default="float32", help="of such a model")
    parser.add_argument("--text", type=Path, help="calibration text of such a model")
    parser.add_argument("--sampled", action="store_true", help="no data: the model's own samples")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON to write, or to add to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
