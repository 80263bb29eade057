"""Every recipe at every width on several texts and windows: one shard of the work, in one process.

    python -m benchmarks.pareto --model MODEL --texts WIKITEXT C4.jsonl NOVEL --calibration OTHER \
        --device cuda --shard 0/12 --seconds 240 --out FOLDER
    python -m benchmarks.pareto_merge FOLDER --json docs/results/pareto.json

Shards run side by side, on one device as well. All of them score the same windows in the same
order, a few of every text at a time, and stop when their time is up; what is scored is in a file
of the laboratory's results by then. With ``--calibrate-on NAME`` the second half of that text
calibrates instead of the given one, with ``--calibrate-on none`` the model samples its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, failure, save
from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.errors import KVQuantError
from kvquant_compile.evaluate.lab import Lab
from kvquant_compile.evaluate.points import SIMULATED, Point, parse_points
from kvquant_compile.evaluate.results import Results
from kvquant_compile.evaluate.source import digest
from kvquant_compile.evaluate.text import read_text
from kvquant_compile.loading import load_model
from kvquant_compile.memory.formulas import layer_cache
from kvquant_compile.progress import Progress

RECIPES = "kvquant+,kvquant,kvquant-released,gear,rvq,kivi,rotatekv,qserve,int,fp8,bf16"
NONE = "none"
ROUND_TOKENS = 16_384
"""Tokens of every text and window that are scored before the next ones are."""


@dataclass
class Shard:
    """Some points of one model and calibration.

    Attributes:
        labs: one for every text and window, of one source.
        points: what is scored.
        ends: when to stop, by ``time.perf_counter``.
        failures: name of a point -> what happened.
    """

    labs: Sequence[Lab]
    points: list[Point]
    ends: float
    failures: dict[str, str] = field(default_factory=dict)

    def try_all(self) -> None:
        """Calibrate, and leave out points that cannot be scored."""
        first = self.labs[0]
        self.points = [p for p in self.points if self._score(first, [p], first.batch)]

    def run(self) -> None:
        """Score all points until the time is up."""
        for count in range(1, 1 + max(self._rounds(lab) for lab in self.labs)):
            for lab in self.labs:
                if time.perf_counter() > self.ends or not self.points:
                    return
                wanted = min(count * max(1, ROUND_TOKENS // lab.window), len(lab.windows))
                self._score(lab, self.points, wanted)

    def _rounds(self, lab: Lab) -> int:
        return -(-len(lab.windows) * lab.window // ROUND_TOKENS)

    def _score(self, lab: Lab, points: Sequence[Point], count: int) -> bool:
        """Whether the first windows of a lab could be scored."""
        try:
            with lab.results.written_once():
                lab.score(points, count)
        except (KVQuantError, RuntimeError, ValueError) as error:
            for point in points:
                self.failures[point.name] = failure(error)
            print(f"{', '.join(p.name for p in points)}: {failure(error)}", flush=True)
            return False
        return True


def make_labs(args: argparse.Namespace, results: Results, bar: Progress) -> list[Lab]:
    """A lab for every text and window, of one model with one calibration."""
    texts = {path.stem: read_text(path) for path in args.texts}
    if args.calibrate_on is None:
        data: str | None = read_text(args.calibration)
    elif args.calibrate_on == NONE:
        data = None
    else:
        data = texts[args.calibrate_on]
        data = data[len(data) // 2 :]
    model, tokenizer = load_model(args.model, args.dtype)
    model.to(args.device)
    options = CalibrationOptions.make(args.seed, args.calibration_windows, own_text=args.own_text)
    some = next(iter(texts.values()))
    whole = Lab(model, tokenizer, some, args.windows[0], None, data, options, results, bar)
    limits = args.limits or [None] * len(texts)
    return [
        whole.on(text, window, limit and max(1, limit // window), max(1, args.tokens // window))
        for text, limit in zip(texts.values(), limits, strict=True)
        for window in args.windows
    ]


def record(args: argparse.Namespace, shard: Shard, seconds: dict[str, float]) -> dict[str, Any]:
    """What a reader of the results has to know of this run."""
    first = shard.labs[0]
    source = first.prepared
    return {
        "environment": environment(),
        "model": Path(args.model).name,
        "calibration": args.calibrate_on or args.calibration.stem,
        "given": args.calibrate_on is None,
        "calibration_source": source.source,
        "texts": {digest(read_text(path)): path.stem for path in args.texts},
        "elements": sum(
            plan.kv_heads * (plan.key_dim + plan.value_dim)
            for plan in (layer.plan for layer in source.layers)
        ),
        "exact_bytes": {point.name: exact_bytes(first, point) for point in shard.points},
        "itemsize": source.captured.dtype.itemsize,
        "failures": shard.failures,
        "seconds": {**seconds, **source.seconds},
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device != "cpu" else None,
    }


def exact_bytes(lab: Lab, point: Point) -> int:
    """Bytes of a sequence's exact tokens in a point's cache, in the dtype of the run."""
    if point.recipe in SIMULATED:
        return 0
    return sum(layer_cache(layout)[1] for layout in lab.program(point).layouts)


def main() -> None:
    """Score one shard."""
    args, start = _arguments(), time.perf_counter()
    index, count = (int(part) for part in args.shard.split("/"))
    name = args.name or f"{args.calibrate_on or 'given'}-{index}-of-{count}"
    args.out.mkdir(parents=True, exist_ok=True)
    points = parse_points(args.recipes, args.bits)[index::count]
    seconds: dict[str, float] = {}

    def note(stage: str) -> None:
        seconds[stage] = round(time.perf_counter() - start, 1)
        if stage != "loaded":
            save(args.out / f"{name}.run", record(args, shard, seconds))
        print(f"{name}: {stage} after {seconds[stage]:.0f} s", flush=True)

    with Progress(False) as bar:
        labs = make_labs(args, Results(args.out / f"{name}.json"), bar)
        shard = Shard(labs, points, start + args.seconds)
        note("loaded")
        shard.try_all()
        note("every point tried")
        shard.run()
        note("done")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibrate-on", help="a scored text's name, or none")
    parser.add_argument("--calibration-windows", type=int)
    parser.add_argument("--own-text", type=float, help="part of the calibration tokens that the "
                        "model samples itself beside a text")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of calibration: another draw")
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--windows", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument(
        "--limits",
        type=int,
        nargs="+",
        help="most tokens of a text; with --calibrate-on, below its half",
    )
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a pass")
    parser.add_argument("--shard", default="0/1", help="this one / of so many")
    parser.add_argument("--name", help="of the files")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which it stops")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
