"""Perplexity of every codec and the contribution of every ingredient, through compiled graphs.

    python benchmarks/accuracy.py --model MODEL --text wikitext2_test.txt \
        --calibration calibration.txt --device cuda --json accuracy.json

Tables: (1) ours with given text and with none, against the baselines; (2) the ablation, built up
ingredient by ingredient; (3) the full codec with one ingredient taken out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.calib.data import calibration_windows, sample_windows
from kvquant_compile.calib.fit import fit_layer
from kvquant_compile.calib.observe import Observed, observe
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.capture import Captured, capture
from kvquant_compile.codec.spec import CodecSpec, LayerTables
from kvquant_compile.config import FormatOptions
from kvquant_compile.evaluate.table import Row, baseline_codecs, evaluate_table, render
from kvquant_compile.evaluate.text import read_text, text_windows
from kvquant_compile.passes.recognise import MatchedLayer, recognise
from kvquant_compile.runtime.program import Program, build_program

PLAIN = FitSettings(
    key_nuq=False,
    value_nuq=False,
    sensitivity=False,
    scale_squared=False,
    token_power=0.0,
    stretch=0.0,
    key_feedback=False,
    value_feedback=False,
)


@dataclass(frozen=True)
class Variant:
    """One codec of the ablation."""

    name: str
    fit: FitSettings
    slots: int = 1
    sinks: int = 1
    token_scale: bool = True
    pre_rope: bool = True

    def spec(self, bits: int) -> CodecSpec:
        return CodecSpec(bits, bits, self.slots, self.slots, self.token_scale, self.sinks)


def ladder() -> list[Variant]:
    """Each line adds one ingredient to the line before."""
    bare = Variant("per-channel keys after RoPE, uniform", PLAIN, 0, 0, False, False)
    steps = [bare, replace(bare, name="+ keys before RoPE", pre_rope=True)]

    def add(name: str, fit: dict[str, Any] | None = None, **form: Any) -> None:
        last = steps[-1]
        steps.append(replace(last, name=name, fit=replace(last.fit, **(fit or {})), **form))

    add("+ exact first token", sinks=1)
    add("+ NUQ key tables, unweighted", {"key_nuq": True})
    add("+ Fisher weights, no s^2", {"sensitivity": True})
    add("+ s^2", {"scale_squared": True})
    add("+ weights by token", {"token_power": FitSettings().token_power})
    add("+ 1 outlier slot each", slots=1)
    add("+ key token scale", token_scale=True)
    add("+ Q-Norm (stretch)", {"stretch": FitSettings().stretch})
    add("+ value error feedback", {"value_feedback": True})
    add("+ key error feedback (= default)", {"key_feedback": True})
    return steps


def leave_one_out() -> list[Variant]:
    """The default without one ingredient."""
    full, base = Variant("default", FitSettings()), FitSettings()
    out = [full, replace(full, name="keys after RoPE", pre_rope=False)]
    out += [
        replace(full, name="no outlier slots", slots=0),
        replace(full, name="no exact first token", sinks=0),
        replace(full, name="4 exact first tokens", sinks=4),
        replace(full, name="no key token scale", token_scale=False),
    ]
    switches: dict[str, dict[str, Any]] = {
        "uniform keys": {"key_nuq": False},
        "NUQ values": {"value_nuq": True},
        "no gradients at all": {
            "sensitivity": False,
            "token_power": 0.0,
            "key_feedback": False,
            "value_feedback": False,
        },
        "Fisher without s^2": {"scale_squared": False},
        "no weights by token": {"token_power": 0.0},
        "no Q-Norm": {"stretch": 0.0},
        "no value feedback": {"value_feedback": False},
        "no key feedback": {"key_feedback": False},
    }
    out += [replace(full, name=n, fit=replace(base, **s)) for n, s in switches.items()]
    return out


class Bench:
    """A captured model with calibration tokens, and programs built from it."""

    def __init__(self, captured: Captured, layers: Sequence[MatchedLayer], data: list[Tensor]):
        self.captured, self.layers = captured, tuple(layers)
        self.post = tuple(
            replace(layer, plan=replace(layer.plan, rope=None)) for layer in self.layers
        )
        self.data = data
        self.seen = {True: observe(captured, self.layers, data, True)}

    def observed(self, pre_rope: bool) -> dict[int, Observed]:
        if pre_rope not in self.seen:
            self.seen[pre_rope] = observe(self.captured, self.post, self.data, True)
        return self.seen[pre_rope]

    def program(self, variant: Variant, bits: int) -> Program:
        layers = self.layers if variant.pre_rope else self.post
        seen, spec = self.observed(variant.pre_rope), variant.spec(bits)
        tables: dict[int, LayerTables] = {}
        for layer in layers:
            x = seen[layer.plan.index]
            tables[layer.plan.index] = fit_layer(
                x.keys,
                x.values,
                x.key_gradients,
                x.value_gradients,
                spec,
                variant.fit,
                ignore=x.places < spec.sink_tokens,
            )
        return build_program(self.captured, layers, dict.fromkeys(tables, spec), tables)


def table(
    bench: Bench,
    variants: Iterable[Variant],
    bits: Sequence[int],
    windows: Sequence[Tensor],
    title: str,
    baselines: bool = False,
) -> list[Row]:
    """Build, score and print; rows are named "variant, n bits"."""
    start = time.perf_counter()
    programs = {f"{v.name}, {b} bits": (b, bench.program(v, b)) for v in variants for b in bits}
    built = time.perf_counter()
    codecs = baseline_codecs(bits, bench.observed(True)) if baselines else {}
    rows = evaluate_table(bench.captured, bench.layers, programs, codecs, windows)
    took = f"built in {built - start:.0f} s, scored in {time.perf_counter() - built:.0f} s"
    Console(width=110).print(render(rows, f"{title} ({took})"))
    return rows


def main() -> None:
    args = _arguments()
    options = CalibrationOptions.make(seed=args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model = model.eval().to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = text_windows(read_text(args.text), tokenizer, args.window, args.limit)
    captured = capture(model)
    layers = recognise(captured)
    text = calibration_windows(read_text(args.calibration), tokenizer, captured, options.windows)
    bench = Bench(captured, layers, text)
    full = Variant("ours", FitSettings(), 1, FormatOptions().sinks)
    record: dict[str, Any] = {
        "arguments": {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    }
    record["environment"] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
    }

    def run(name: str, *rest: Any, **more: Any) -> None:
        record[name] = [row.to_dict() for row in table(*rest, name, **more)]
        args.json.write_text(json.dumps(record, indent=1))

    run("calibrated on text", bench, [full], args.bits, windows, baselines=True)
    sampled = sample_windows(captured, options.sampled)
    run("no calibration data", Bench(captured, layers, sampled), [full], args.bits, windows)
    if args.ablation:
        few = windows[: args.ablation]
        run("built up", bench, ladder(), args.ablation_bits, few)
        run("one taken out", bench, leave_one_out(), args.ablation_bits, few)
    record["options"] = asdict(options)
    args.json.write_text(json.dumps(record, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--limit", type=int, help="windows of the main tables")
    parser.add_argument("--ablation", type=int, default=24, help="windows of the ablation, 0: none")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--ablation-bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("accuracy.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
