"""``kvquant-compile demo``: the main job on an embedded model, measured as it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from torch import Tensor

import kvquant_compile
from kvquant_compile.calib.observe import observe
from kvquant_compile.evaluate.table import Row, baseline_codecs, evaluate_table, render
from kvquant_compile.evaluate.text import read_text, text_windows
from kvquant_compile.loading import load_model
from kvquant_compile.progress import Progress
from kvquant_compile.runtime.installed import Installed, installed
from kvquant_compile.runtime.program import Program

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
    console = Console(quiet=quiet, width=None if sys.stdout.isatty() else 110)
    if name is None:
        torch.set_num_threads(1)  # its ops are too small to be shared: threads only wait
    model, tokenizer = load_model(str(ASSETS) if name is None else name, dtype)
    size = sum(p.numel() for p in model.parameters())
    console.print(f"[bold]{name or 'embedded demo model'}[/bold]: {size / 1e6:.1f} M parameters")
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    continuations = {"original": _continue(model, tokenizer, inputs, tokens)}
    start = time.perf_counter()
    windows = kvquant_compile.sample_calibration(model, windows=16)
    seconds = {"sampling its own calibration text": time.perf_counter() - start}
    reports: dict[str, Any] = {}
    programs: dict[str, tuple[int, Program]] = {}
    for b in bits:
        start = time.perf_counter()
        shown = False if quiet else None
        kvquant_compile.optimize(
            model, b, calibration=windows, windows=len(windows), own_text=0, progress=shown
        )
        seconds[f"optimize to {b} bits"] = time.perf_counter() - start
        report = kvquant_compile.explain(model)
        if b == bits[0]:
            console.print(report)
        reports[str(b)] = report.to_dict()
        programs[f"ours, {b} bits"] = (b, installed(model).program)
        continuations[f"{b} bits"] = _continue(model, tokenizer, inputs, tokens)
        state = installed(model)
        kvquant_compile.restore(model)
    rows = _score(state, programs, windows, tokenizer, window, limit, quiet)
    _print_rest(console, rows, seconds, continuations, window)
    return {
        "model": name or "embedded",
        "reports": reports,
        "seconds": seconds,
        "rows": [row.to_dict() for row in rows],
        "prompt": PROMPT,
        "continuations": continuations,
    }


def _continue(model: Any, tokenizer: Any, inputs: Any, tokens: int) -> str:
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def _score(
    state: Installed,
    programs: dict[str, tuple[int, Program]],
    calibration: Sequence[Tensor],
    tokenizer: Any,
    window: int,
    limit: int,
    quiet: bool,
) -> list[Row]:
    """Held-out perplexity of the very programs that generated, and of the baselines."""
    windows = text_windows(read_text(str(ASSETS / "heldout.txt")), tokenizer, window, limit)
    with Progress(False if quiet else None) as bar:
        observed = observe(state.captured, state.layers, calibration, gradients=True)
        codecs = baseline_codecs([b for b, _ in programs.values()], observed)
        return evaluate_table(
            state.captured,
            state.layers,
            programs,
            codecs,
            windows,
            lambda items: bar.each("score windows", items, len(items)),
        )


def _print_rest(
    console: Console,
    rows: Sequence[Row],
    seconds: dict[str, float],
    continuations: dict[str, str],
    window: int,
) -> None:
    console.print("; ".join(f"{stage}: {s:.1f} s" for stage, s in seconds.items()))
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
