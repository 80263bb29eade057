"""Calibrated on one text, scored on another: every pair of some texts, and no text at all.

    python -m benchmarks.cross_text --model MODEL --texts A.txt B.txt C.jsonl --json cross.json

The first windows of every text are scored, the second half of it calibrates, so that the same text
means the same kind of text and not the same tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.config import FormatOptions
from kvquant_compile.evaluate.run import Prepared, build, prepare
from kvquant_compile.evaluate.score import compare, summary
from kvquant_compile.evaluate.table import original_logits, program_logits
from kvquant_compile.evaluate.text import read_text, text_windows
from kvquant_compile.progress import Progress


def scores(
    prepared: Prepared, bits: int, scored: Mapping[str, list[Tensor]], options: CalibrationOptions
) -> dict[str, Any]:
    """Loss and divergence on every text."""
    exact = original_logits(prepared.captured)
    run, _ = program_logits(prepared.captured, build(prepared, FormatOptions(bits), options))
    found = {}
    for name, windows in scored.items():
        rows, originals = [], []
        for ids in windows:
            base, targets = exact(ids)[0, :-1], ids[0, 1:]
            rows.append(compare(base, run(ids)[0, :-1], targets))
            originals.append(compare(base, base, targets))
        stacked = torch.stack(rows), torch.stack(originals)
        score = summary(*stacked, sum(ids.shape[1] - 1 for ids in windows))
        loss = 100 * float((stacked[0] - stacked[1])[:, 0].mean().expm1())
        found[name] = vars(score) | {"loss_percent": loss}
        print(f"    {name}: {loss:+.2f} %, KL {score.kl:.5f} ± {score.kl_error:.5f}", flush=True)
    return found


def main() -> None:
    args = _arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = {path.stem: read_text(path) for path in args.texts}
    scored = {n: text_windows(t, tokenizer, args.window, args.limit) for n, t in texts.items()}
    data: dict[str, str | None] = {n: t[len(t) // 2 :] for n, t in texts.items()}
    options = CalibrationOptions.make(windows=args.windows)
    record: dict[str, Any] = {"window": args.window, "limit": args.limit, "scores": {}}
    for name, text in (data | {"no text": None}).items():
        with Progress(False) as bar:
            prepared = prepare(model, text, tokenizer, options, bar)
        for bits in args.bits:
            print(f"calibrated on {name}, {bits} bits", flush=True)
            record["scores"][f"{name}, {bits} bits"] = scores(prepared, bits, scored, options)
            args.json.write_text(json.dumps(record, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--json", type=Path, default=Path("cross_text.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
