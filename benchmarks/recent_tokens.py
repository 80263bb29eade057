"""What exact recent tokens are worth: ``recent_window=``, and a text read in steps.

    python benchmarks/recent_tokens.py --model MODEL --text TEXT --calibration OTHER --json OUT

With a window of R a token and R - 1 predecessors are exact in one pass that reads everything from
the cache, as they are when decoding. A step of S tokens attends to its own tokens exactly and to
all before it through the packed cache, so that (S - 1) / 2 of a token's predecessors are exact in
the mean. A window stores 16 R / L bits more an element in a cache of L tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
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


def with_window(artifact: Any, recent: int) -> Any:
    """The same tables in pages beside which ``recent`` last tokens are exact."""
    specs = {i: dataclasses.replace(s, recent_tokens=recent) for i, s in artifact.specs.items()}
    return dataclasses.replace(artifact, specs=specs)


class Scorer:
    """Scores of an optimised model against the original on some windows."""

    def __init__(self, model: Any, windows: Sequence[Tensor]) -> None:
        self.model, self.windows = model, windows
        with torch.no_grad():
            self.exact = [model(ids).logits[0, :-1] for ids in windows]
        pairs = zip(self.exact, windows, strict=True)
        self.original = torch.stack([compare(p, p, ids[0, 1:]) for p, ids in pairs])

    def score(self, step: int) -> dict[str, Any]:
        """Read in steps of so many tokens; 0: in one pass from the cache."""
        rows = [
            compare(p, in_steps(self.model, ids, step)[:-1], ids[0, 1:])
            for p, ids in zip(self.exact, self.windows, strict=True)
        ]
        tokens = sum(ids.shape[1] - 1 for ids in self.windows)
        return vars(summary(torch.stack(rows), self.original, tokens))

    def effective_bits(self) -> float:
        """Of a cache of one window."""
        cache = kvquant_compile.new_cache(self.model)
        with torch.no_grad():
            self.model(self.windows[0], past_key_values=cache)
        return float(cache.effective_bits())


def main() -> None:
    args = _arguments()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = text_windows(read_text(args.text), tokenizer, args.window, args.limit)
    scorer = Scorer(model, windows)
    record: dict[str, Any] = {"arguments": vars(args) | {"model": Path(args.model).name}}
    for name in ("text", "calibration", "json"):
        record["arguments"][name] = vars(args)[name].name

    def note(name: str, found: dict[str, Any]) -> None:
        record[name] = found
        bits = f", {found['bits']:.3f} bits" if "bits" in found else ""
        print(f"{name}: KL {found['kl']:.5f} ± {found['kl_error']}{bits}", flush=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")

    for bits in args.bits:
        data, options = read_text(args.calibration), {"windows": args.windows, "progress": False}
        options["slots"] = args.slots
        kvquant_compile.optimize(model, bits, calibration=data, tokenizer=tokenizer, **options)
        artifact = kvquant_compile.artifact(model)
        for step in args.steps:
            note(f"{bits} bits, steps of {step}", scorer.score(step))
        kvquant_compile.restore(model)
        for recent in args.recent:
            kvquant_compile.optimize(model, calibration=with_window(artifact, recent))
            found = {**scorer.score(0), "bits": scorer.effective_bits()}
            note(f"{bits} bits, recent_window={recent}", found)
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
    parser.add_argument("--steps", type=int, nargs="*", default=[0, 8, 32, 128])
    parser.add_argument("--recent", type=int, nargs="*", default=[0, 16, 32, 64, 128])
    parser.add_argument("--slots", type=int)
    parser.add_argument("--json", type=Path, default=Path("recent_tokens.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
