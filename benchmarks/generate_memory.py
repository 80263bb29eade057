"""Peak memory and speed of ``generate`` on a CPU: the original against the optimised model.

    python benchmarks/generate_memory.py --model MODEL --text novel.txt --tokens 16384 --bits 3

Each contender runs in a process of its own. Peak memory is the process's highest anonymous memory
above what it was with the model loaded (and optimised); it includes the prompt's activations,
which are the same for both. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def measure(arguments: argparse.Namespace, bits: int | None, pipe: Any) -> None:
    """Run one contender and send its figures back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import kvquant_compile

    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = ids[:, : arguments.tokens]
    if bits is not None:
        windows = [w[None] for w in ids[0, :8192].split(512)]
        kvquant_compile.optimize(model, bits, calibration=windows, windows=4, progress=False)
    generate(model, ids[:, :64], 2)
    with PeakMemory() as memory:
        result, times = generate(model, ids, 1 + arguments.new)
    cache = result.past_key_values
    nbytes = cache.nbytes() if bits is not None else _dense_bytes(cache)
    pipe.send(
        {
            "contender": "original" if bits is None else f"{bits} bits",
            "tokens": ids.shape[1],
            "peak_bytes": memory.peak - memory.before,
            "cache_bytes": nbytes,
            "prefill_seconds": times[0],
            "seconds_per_token": statistics.median(times[1:]),
        }
    )


def generate(model: Any, ids: torch.Tensor, new: int) -> tuple[Any, list[float]]:
    """Greedy generation of exactly ``new`` tokens, and the seconds of every step."""
    ticks = [time.perf_counter()]

    def tick(tokens: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ticks.append(time.perf_counter())
        return torch.zeros(tokens.shape[0], dtype=torch.bool)

    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        stopping_criteria=[tick],
    )
    return result, [b - a for a, b in itertools.pairwise(ticks)]


def _dense_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class PeakMemory:
    """Highest anonymous memory of this process inside the block, sampled every few milliseconds.

    Anonymous only: mapped weights come and go with the page cache and say nothing here.
    """

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of generate on a CPU.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384, help="of the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [_in_process(arguments, bits) for bits in [None, *arguments.bits]]
    table = Table(title=f"{arguments.tokens} tokens, {arguments.dtype}", title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = (f"{v:,.3f}" if isinstance(v, float) else v for v in row.values())
        table.add_row(*(f"{c:,}" if isinstance(c, int) else c for c in cells))
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


def _in_process(arguments: argparse.Namespace, bits: int | None) -> dict[str, Any]:
    # Freed tensors go back to the system at once, so that the peak is the program's own.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(arguments, bits, sender))
    process.start()
    sender.close()
    row: dict[str, Any] = receiver.recv()
    process.join()
    return row


if __name__ == "__main__":
    main()
