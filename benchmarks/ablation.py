"""What each ingredient of the default codec is worth: one taken out, or one put in, at a time.

    python -m benchmarks.ablation --model MODEL --text TEXT --calibration OTHER --json ablation.json

Every variant is scored on the same windows, on every ``--every``-th token of them; differences to
the default are paired by window. The file is resumed from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.ablation_codecs import Layer, Variant, variants
from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.calib.observe import run_captured
from kvquant_compile.capture import capture
from kvquant_compile.evaluate.fake import insert_codec
from kvquant_compile.evaluate.run import Prepared, prepare
from kvquant_compile.evaluate.score import compare
from kvquant_compile.evaluate.stored import KEYS, VALUES, Trip
from kvquant_compile.evaluate.text import read_text, text_windows
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.progress import Progress


class Trips:
    """Round trips as a codec of :mod:`kvquant_compile.evaluate.fake`."""

    pre_rope = True

    def __init__(self, trips: dict[int, dict[str, Trip]]) -> None:
        self.trips = trips

    def keys(self, x: Tensor, layer: int) -> Tensor:
        return self.trips[layer][KEYS](x)

    def values(self, x: Tensor, layer: int) -> Tensor:
        return self.trips[layer][VALUES](x)

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        raise NotImplementedError


class Bench:
    """Windows, and the original's logits on some of their tokens."""

    def __init__(self, prepared: Prepared, windows: list[Tensor], every: int) -> None:
        self.prepared, self.windows, self.every = prepared, windows, every
        self.layers = [Layer(m.plan, prepared.observed[m.plan.index]) for m in prepared.layers]
        self.exact = [self._logits(prepared.captured.graph_module, ids) for ids in windows]

    def score(self, variant: Variant, bits: int) -> list[list[float]]:
        """(loss, KL, top-1) of every window."""
        codec = Trips({x.plan.index: variant.trips(x, bits) for x in self.layers})
        run, _ = insert_codec(self.prepared.captured.graph_module, self.prepared.layers, codec)
        found = []
        for ids, exact in zip(self.windows, self.exact, strict=True):
            found.append(compare(exact, self._logits(run, ids), self._targets(ids)).tolist())
        return found

    def originals(self) -> list[list[float]]:
        return [
            compare(exact, exact, self._targets(ids)).tolist()
            for ids, exact in zip(self.windows, self.exact, strict=True)
        ]

    def _targets(self, ids: Tensor) -> Tensor:
        return ids[0, 1 :: self.every]

    def _logits(self, run: Callable[..., Tensor], ids: Tensor) -> Tensor:
        """Of every so many tokens: the model's head is not run for the others."""
        some = lambda *inputs: run(*inputs)[:, : -1 : self.every]  # noqa: E731
        with torch.no_grad():
            return run_captured(self.prepared.captured, some, ids)[0]


def table(record: dict[str, Any], bits: int) -> Table:
    """Differences to the default, paired by window, and their standard errors."""
    rows, original = record["rows"], torch.tensor(record["original"])
    out = Table(title=f"{bits} bits")
    for name in ("variant", "eff. bits", "loss", "KL", "KL against default"):
        out.add_column(name, justify="left" if name == "variant" else "right")
    default = torch.tensor(rows[f"default, {bits}"]["windows"])
    for name, row in rows.items():
        variant, _, width = name.rpartition(", ")
        if int(width) == bits:
            found = torch.tensor(row["windows"])
            loss = 100 * float((found - original)[:, 0].mean().expm1())
            change = (found - default)[:, 1]
            base, error = float(default[:, 1].mean()), float(change.std() / len(change) ** 0.5)
            relative = f"{100 * float(change.mean()) / base:+.1f} ± {100 * error / base:.1f} %"
            kl = f"{float(found[:, 1].mean()):.5f}"
            out.add_row(variant, f"{row['effective_bits']:.3f}", f"{loss:+.2f} %", kl, relative)
    return out


def _kept(
    path: Path | None, model: Any, data: Any, tokenizer: Any, options: Any, bar: Progress
) -> Prepared:
    """Calibration tokens of an earlier run, or new ones."""
    if path is not None and path.exists():
        captured = capture(model)
        kept = torch.load(path, weights_only=False)
        return Prepared(captured, recognise(captured), kept["observed"], kept["source"], {})
    made = prepare(model, data, tokenizer, options, bar)
    if path is not None:
        torch.save({"observed": made.observed, "source": made.source}, path)
    return made


def main() -> None:
    args = _arguments()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = text_windows(read_text(args.text), tokenizer, args.window, args.limit)
    data = None if args.calibration is None else read_text(args.calibration)
    options = CalibrationOptions.make(windows=args.windows)
    with Progress(False) as bar:
        bench = Bench(_kept(args.keep, model, data, tokenizer, options, bar), windows, args.every)
    given = {k: v for k, v in vars(args).items() if k not in ("keep", "json", "only")}
    arguments = {k: v.name if isinstance(v, Path) else v for k, v in given.items()}
    arguments["model"] = Path(args.model).name
    record: dict[str, Any] = {"arguments": arguments, "rows": {}}
    if args.json.exists():
        record = json.loads(args.json.read_text())
    record["original"] = bench.originals()
    for bits in args.bits:
        for variant in [v for v in variants() if not args.only or v.name in args.only]:
            name = f"{variant.name}, {bits}"
            if name not in record["rows"]:
                size = variant.effective_bits(bench.layers[0], bits, args.window)
                found = bench.score(variant, bits)
                record["rows"][name] = {"effective_bits": size, "windows": found}
                args.json.write_text(json.dumps(record, indent=1) + "\n")
        Console(width=110).print(table(record, bits))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="text; default: the model's own")
    parser.add_argument("--windows", type=int, help="calibration windows")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--only", nargs="+", help="names of variants; default: all")
    parser.add_argument("--keep", type=Path, help="file of calibration tokens, for the next run")
    parser.add_argument("--json", type=Path, default=Path("ablation.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
