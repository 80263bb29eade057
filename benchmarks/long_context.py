"""A long prompt through ``generate`` on a CPU: peak memory against the memory model's prediction.

    python benchmarks/long_context.py --tokens 131072 --chunk 4096

The embedded demo model unless ``--model`` says otherwise; tokens are random, which changes neither
memory nor time. Peak memory is a process's highest anonymous memory above what it was with the
model optimised; the prediction is made in another process. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import kvquant_compile
from benchmarks.generate_memory import PeakMemory, generate

DEMO = Path(kvquant_compile.__file__).parent / "assets" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a long prompt on a CPU.")
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--tokens", type=int, default=131072, help="of the prompt")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a prefill step")
    parser.add_argument("--new", type=int, default=8, help="tokens to generate")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    asked = {name: getattr(arguments, name) for name in ("tokens", "chunk", "bits", "dtype")}
    with tempfile.TemporaryDirectory() as folder:
        artifact = str(Path(folder) / "tables.safetensors")
        predicted = in_process(predict, arguments, artifact)
        record = asked | predicted | in_process(measure, arguments, artifact)
    record["predicted peak"] = sum(predicted.values())
    print(json.dumps(record, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def load(arguments: argparse.Namespace, calibration: str | None) -> Any:
    """The optimised model."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    return kvquant_compile.optimize(
        model, arguments.bits, calibration=calibration, progress=False,
        prefill_chunk=arguments.chunk,
    )  # fmt: skip


def predict(arguments: argparse.Namespace, artifact: str, pipe: Any) -> None:
    """Calibrate, keep the tables, and send what the memory model says."""
    model = load(arguments, None)
    kvquant_compile.artifact(model).save(artifact)
    context = arguments.tokens + arguments.new
    report = kvquant_compile.memory_report(model, context, prompt=arguments.tokens)
    parts = ("cache", "workspace", "tokens and masks")
    pipe.send({f"predicted {part}": report.bytes(part) for part in parts})


def measure(arguments: argparse.Namespace, artifact: str, pipe: Any) -> None:
    """Send what a prompt and a few tokens take."""
    model = load(arguments, artifact)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, arguments.tokens), generator=generator)
    with PeakMemory() as memory:
        result, times = generate(model, ids, arguments.new)
    pipe.send(
        {
            "peak": memory.peak - memory.before, "cache": result.past_key_values.nbytes(),
            "prefill seconds": times[0], "seconds per token": statistics.median(times[1:]),
        }
    )  # fmt: skip


def in_process(work: Any, *arguments: Any) -> dict[str, Any]:
    """What ``work`` sends, run in a process that nothing has happened in."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        raise SystemExit("the process died") from None
    process.join()
    return found


if __name__ == "__main__":
    # Freed tensors go back to the system at once, so that the peak is the program's own.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    main()
