"""What exact recent tokens are worth: a text read in steps, each step's own tokens exact.

    python benchmarks/recent_tokens.py --model MODEL --text TEXT --calibration OTHER --json OUT

A step of S tokens attends to its own tokens exactly and to all before it through the packed cache,
so that (S - 1) / 2 of a token's predecessors are exact in the mean. A ring of the last R tokens
would store (16 - b) R / L bits more an element in a cache of L tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvquant_compile
from kvquant_compile.evaluate.score import compare, summary
from kvquant_compile.evaluate.text import read_text, text_windows


def in_steps(model: Any, ids: Tensor, step: int) -> Tensor:
    """Logits [S, vocab]; with a step of 0 in one pass that reads everything from the cache."""
    cache = kvquant_compile.new_cache(model)
    with torch.no_grad():
        if step == 0:
            with kvquant_compile.quantised_attention(model):
                return model(ids, past_key_values=cache).logits[0]
        parts = [model(x, past_key_values=cache).logits[0] for x in ids.split(step, 1)]
    return torch.cat(parts)


def main() -> None:
    args = _arguments()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = text_windows(read_text(args.text), tokenizer, args.window, args.limit)
    with torch.no_grad():
        exact = [model(ids).logits[0, :-1] for ids in windows]
    original = torch.stack(
        [compare(p, p, ids[0, 1:]) for p, ids in zip(exact, windows, strict=True)]
    )
    record: dict[str, Any] = {"arguments": vars(args) | {"model": Path(args.model).name}}
    for name in ("text", "calibration", "json"):
        record["arguments"][name] = vars(args)[name].name
    for bits in args.bits:
        data = read_text(args.calibration)
        kvquant_compile.optimize(
            model, bits, calibration=data, tokenizer=tokenizer, windows=args.windows, progress=False
        )
        for step in args.steps:
            rows = [
                compare(p, in_steps(model, ids, step)[:-1], ids[0, 1:])
                for p, ids in zip(exact, windows, strict=True)
            ]
            score = summary(torch.stack(rows), original, len(windows) * (args.window - 1))
            record[f"{bits} bits, steps of {step}"] = vars(score)
            print(f"{bits} bits, steps of {step}: KL {score.kl:.5f} ± {score.kl_error}", flush=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
        kvquant_compile.restore(model)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 8, 32, 128])
    parser.add_argument("--json", type=Path, default=Path("recent_tokens.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
