"""Whole decode steps on a CPU by length of context: the original against the optimised model.

    python benchmarks/cpu_steps.py --model MODEL --bits 3 --tokens 4096 131072

Caches are filled with random pages (the original's with random keys and values), so that no prompt
has to be read; tables are random too, which changes no time. One thread; the clock is its own
processor time.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache

import kvquant_compile
from benchmarks.cpu_decode import slope
from benchmarks.synthetic import filled_cache, random_artifact
from kvquant_compile.codec.spec import CodecSpec


def original_cache(model: Any, tokens: int) -> DynamicCache:
    """Random keys and values of every layer."""
    config, cache = model.config, DynamicCache(config=model.config)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape).to(model.dtype), torch.randn(shape).to(model.dtype), layer)
    return cache


def steps(model: Any, cache: Any, count: int) -> float:
    """Seconds of the fastest of some decode steps."""
    ids, best = torch.zeros(1, 1, dtype=torch.long), float("inf")
    with torch.no_grad():
        for _ in range(count):
            began = time.thread_time()
            model(ids, past_key_values=cache)
            best = min(best, time.thread_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode steps on a CPU.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(12, 18)])
    parser.add_argument("--count", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    found: dict[str, list[tuple[float, int]]] = {"original": [], f"{arguments.bits} bits": []}
    for tokens in arguments.tokens:
        cache = original_cache(model, tokens)
        nbytes = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        found["original"].append((steps(model, cache, arguments.count), nbytes))
    del cache
    spec = CodecSpec(arguments.bits, arguments.bits, 1, 1, True, 1)
    kvquant_compile.optimize(model, arguments.bits, calibration=random_artifact(model, spec))
    for tokens in arguments.tokens:
        quantised = kvquant_compile.new_cache(model)
        filled_cache(quantised, 1, tokens, arguments.count)
        nbytes = quantised.nbytes()
        found[f"{arguments.bits} bits"].append((steps(model, quantised, arguments.count), nbytes))
    _print(arguments, found)


def _print(arguments: argparse.Namespace, found: dict[str, list[tuple[float, int]]]) -> None:
    table = Table(title=f"{arguments.model}: a decode step", title_justify="left")
    for name in ("tokens", *(f"{n}: {x}" for n in found for x in ("ms", "cache MB"))):
        table.add_column(name, justify="right")
    for i, tokens in enumerate(arguments.tokens):
        cells = [
            text
            for rows in found.values()
            for seconds, cache in [rows[i]]
            for text in (f"{seconds * 1e3:.1f}", f"{cache / 1e6:.1f}")
        ]
        table.add_row(f"{tokens:,}", *cells)
    lines = [slope(arguments.tokens, [row[0] for row in rows]) * 1e9 for rows in found.values()]
    table.add_row("ns a token", *(x for line in lines for x in (f"{line:.0f}", "")))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
