"""What a calibration text changes, in the mean over draws of :mod:`benchmarks.pareto`.

    python -m benchmarks.pareto ... --calibrate-on NAME --own-text 0.5 --seed 1 --out FOLDER
    python -m benchmarks.pareto_draws FOLDER --json docs/results/draws-llama-63m.json

A draw is a seed: other windows of a text, and other text of the model's own. Draws are compared on
the windows that all of a text's have.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.measure import save
from kvquant_compile.evaluate.points import ORIGINAL
from kvquant_compile.evaluate.results import Results
from kvquant_compile.recipes.choice import OURS

NONE = "none"
Windows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Draw:
    """One calibration, scored on one text.

    Attributes:
        text, bits: what was scored, at which whole width.
        calibration: the text that calibrated, or "none".
        own_text: the part of the tokens that the model sampled; None without a text.
        seed: of the draw.
        found, exact: windows of the codec and of the original.
    """

    text: str
    bits: str
    calibration: str
    own_text: float | None
    seed: int
    found: Windows
    exact: Windows


def draws(folder: Path) -> list[Draw]:
    """All draws of a folder of shards, of whole widths of ours."""
    out = []
    for path in sorted(folder.glob("*.run")):
        run = json.loads(path.read_text(encoding="utf-8"))
        results = Results(path.with_suffix(".json")).to_dict()["results"]
        exact = {
            item["identity"]["text"]: item["value"]["windows"]
            for item in results
            if item["identity"]["recipe"] == ORIGINAL
        }
        for item in results:
            identity, made = item["identity"], item["identity"]["calibration"]
            if identity["recipe"] == OURS and identity["bits"].isdigit():
                out.append(Draw(
                    run["texts"][identity["text"]], identity["bits"], run["calibration"],
                    made["own_text"], made["seed"], item["value"]["windows"],
                    exact[identity["text"]],
                ))  # fmt: skip
    return out


def summed(every: Sequence[Draw], least: int) -> list[dict[str, Any]]:
    """Means over draws, by text, width and part of own text; tables from the same kind of text
    first. Draws with fewer than ``least`` windows are left out."""
    kept = [d for d in every if len(d.found) >= least]
    lines = []
    for text, bits in sorted({(d.text, d.bits) for d in kept}, reverse=True):
        here = [d for d in kept if (d.text, d.bits) == (text, bits)]
        count = min(len(d.found) for d in here)
        for own in sorted({d.own_text for d in here if d.own_text is not None}):
            by = {
                name: _mean([d for d in here if d.calibration == name and d.own_text == own], count)
                for name in {d.calibration for d in here} - {NONE}
            }
            by[NONE] = _mean([d for d in here if d.calibration == NONE], count)
            found = {name: mean for name, mean in by.items() if mean}
            if text in found:
                place = {"text": text, "bits": bits, "own_text": own, "windows": count}
                lines.append(place | {"calibrations": found})
    return lines


def _mean(of: Sequence[Draw], count: int) -> dict[str, Any]:
    """Loss in per cent and divergence of some draws, each and in the mean."""
    if not of:
        return {}
    losses = [
        100 * math.expm1(fmean(
            a["loss"] - b["loss"] for a, b in zip(d.found[:count], d.exact[:count], strict=True)
        ))
        for d in of
    ]  # fmt: skip
    divergences = [fmean(w["kl"] for w in d.found[:count]) for d in of]
    return {
        "seeds": [d.seed for d in of], "losses": losses, "divergences": divergences,
        "loss_percent": fmean(losses), "kl": fmean(divergences),
    }  # fmt: skip


def main() -> None:
    """Read the shards and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--least", type=int, default=24, help="windows")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    runs = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(args.folder.glob("*.run"))]
    rows = summed(draws(args.folder), args.least)
    save(args.json, {"environment": runs[0]["environment"], "model": runs[0]["model"],
                     "rows": rows})  # fmt: skip
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
