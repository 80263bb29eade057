"""``kvquant-compile demo``: the main job on an embedded model, measured as it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from torch import nn

import kvquant_compile
from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.evaluate.run import evaluate_widths, prepare
from kvquant_compile.evaluate.table import Row, render
from kvquant_compile.evaluate.text import read_text, text_windows
from kvquant_compile.progress import Progress

PROMPT = "The history of the city begins in the"
ASSETS = files("kvquant_compile") / "assets" / "demo"


def run_demo(
    name: str | None,
    bits: Sequence[int],
    dtype: str,
    tokens: int,
    window: int,
    limit: int,
    quiet: bool = False,
) -> dict[str, Any]:
    """Optimise, score and generate; prints as it goes unless ``quiet``.

    Args:
        name: model folder or hub id; None for the embedded one.
        bits: widths to show.
        dtype: to load the model in.
        tokens: to generate with the original and with every width.
        window, limit: evaluation windows.

    Returns:
        A JSON-able record of everything that was printed.
    """
    from kvquant_compile.cli import load_model

    console = Console(quiet=quiet)
    model, tokenizer = load_model(str(ASSETS) if name is None else name, dtype)
    size = sum(p.numel() for p in model.parameters())
    console.print(f"[bold]{name or 'embedded demo model'}[/bold]: {size / 1e6:.1f} M parameters")
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    continuations = {"original": _continue(model, tokenizer, inputs, tokens)}
    reports, seconds = {}, {}
    for b in bits:
        start = time.perf_counter()
        kvquant_compile.optimize(model, bits=b, progress=None if not quiet else False)
        seconds[str(b)] = time.perf_counter() - start
        report = kvquant_compile.explain(model)
        if b == bits[0]:
            console.print(report)
        reports[str(b)] = report.to_dict()
        continuations[f"{b} bits"] = _continue(model, tokenizer, inputs, tokens)
        kvquant_compile.restore(model)
    rows = _score(model, tokenizer, bits, window, limit, quiet)
    _print_rest(console, rows, seconds, continuations, window)
    return {
        "model": name or "embedded",
        "reports": reports,
        "optimize_seconds": seconds,
        "rows": [row.to_dict() for row in rows],
        "prompt": PROMPT,
        "continuations": continuations,
    }


def _continue(model: Any, tokenizer: Any, inputs: Any, tokens: int) -> str:
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def _score(
    model: nn.Module, tokenizer: Any, bits: Sequence[int], window: int, limit: int, quiet: bool
) -> list[Row]:
    """Held-out perplexity; tables come from the model's own samples, as in ``optimize``."""
    windows = text_windows(read_text(str(ASSETS / "heldout.txt")), tokenizer, window, limit)
    options = CalibrationOptions.make(seed=0, windows=None)
    with Progress(False if quiet else None) as bar:
        prepared = prepare(model, None, tokenizer, options, bar)
        return evaluate_widths(prepared, bits, windows, options, bar)


def _print_rest(
    console: Console,
    rows: Sequence[Row],
    seconds: dict[str, float],
    continuations: dict[str, str],
    window: int,
) -> None:
    took = ", ".join(f"{b} bits {s:.1f} s" for b, s in seconds.items())
    console.print(f"optimize, calibration included: {took}")
    windows = rows[0].score.windows
    title = f"held-out text, {windows} windows of {window}, every token read from the cache"
    console.print(render(rows, title))
    console.print(_bytes_line(rows))
    console.print(f"[bold]prompt:[/bold] {PROMPT}")
    for name, text in continuations.items():
        console.print(Panel(text.strip(), title=name, title_align="left"))


def _bytes_line(rows: Sequence[Row]) -> str:
    """Measured cache bytes of one window against bf16."""
    parts = []
    for row in rows:
        if row.cache_bytes is not None:
            bf16 = row.cache_bytes * 16 / row.effective_bits
            parts.append(f"{row.name} {row.cache_bytes:,} B ({bf16 / row.cache_bytes:.2f}x)")
    reference = next((r.cache_bytes * 16 / r.effective_bits for r in rows if r.cache_bytes), 0.0)
    return f"cache of one window: bf16 {reference:,.0f} B; " + "; ".join(parts)
