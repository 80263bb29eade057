"""The record of all shards of :mod:`benchmarks.pareto`, for the tables of ``benchmarks.report``.

    python -m benchmarks.pareto_merge FOLDER --json docs/results/pareto-llama-63m.json

Codecs are compared on the same windows only: a table takes the first ones that all of its codecs
have, and leaves out (and names) those that have fewer than ``--least``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import save
from kvquant_compile.evaluate.lab import scored_row
from kvquant_compile.evaluate.pareto import front
from kvquant_compile.evaluate.points import ORIGINAL, RELEASED, Point
from kvquant_compile.evaluate.results import Results
from kvquant_compile.evaluate.table import Row
from kvquant_compile.recipes.choice import OURS, PUBLISHED

METHOD = (OURS, PUBLISHED, RELEASED)
Value = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where codecs are compared."""

    calibration: str
    text: str
    window: int


@dataclass(frozen=True)
class Scores:
    """Everything that was scored at a place.

    Attributes:
        values: point -> value of its result; the one with most windows, the original's included.
        exact: name of a point -> effective bits of its exact tokens in the dtype of the run.
        itemsize: bytes of that dtype.
    """

    place: Place
    values: Mapping[Point, Value]
    exact: Mapping[str, float]
    itemsize: int

    def table(self, points: Iterable[Point], least: int) -> dict[str, Any] | None:
        """Points on the windows that all of them have; None when there are no two."""
        counts = {p: len(self.values[p]["windows"]) for p in points if p in self.values}
        kept = [p for p, n in counts.items() if n >= least]
        if len(kept) < 2:
            return None
        count = min(counts[p] for p in kept)
        rows = {p: self.row(p, count) for p in kept}
        ratios = {p: self.ratios(p, self, Point(OURS, p.bits), count) for p in kept}
        best = {row.name for row in front(list(rows.values()))}
        original = self.row(Point(ORIGINAL), count)
        return {
            "calibration": self.place.calibration,
            "text": self.place.text,
            "window": self.place.window,
            "windows": count,
            "perplexity": original.score.perplexity,
            "rows": [
                _line(p, row) | {"best": row.name in best} | ratios[p] for p, row in rows.items()
            ],
            "left_out": [p.name for p in counts if p not in kept],
        }

    def row(self, point: Point, count: int) -> Row:
        """On the first windows, with bits as where exact tokens take 16 bits."""
        value = self.values[point]
        exact = self.exact.get(point.name, 0.0) * (1 - 2 / self.itemsize)
        value = {**value, "effective_bits": value["effective_bits"] - exact}
        return self._scored(point, value, self.values[Point(ORIGINAL)], count)

    def ratios(
        self, point: Point, base: Scores, other: Point, count: int
    ) -> dict[str, float | None]:
        """A point against another one of the same text and windows.

        Returns:
            Its perplexity's excess over the other's in per cent with the standard error of the
            mean of windows' differences, its divergence over the other's, and its loss over the
            other's where that is no noise (twice its error). Empty for the same, and where the
            other one was not scored on all windows.
        """
        known = base.values.get(other, {"windows": ()})
        if len(known["windows"]) < count or (base is self and point == other):
            return {}
        paired = self._scored(point, self.values[point], base.values[other], count)
        mine, theirs = self.row(point, count), base.row(other, count)
        found = {
            "over_percent": paired.loss_percent,
            "over_error": paired.loss_error,
            "times_kl": mine.score.kl / theirs.score.kl,
        }
        if theirs.loss_percent > 2 * (theirs.loss_error or 0.0):
            found["times_loss"] = mine.loss_percent / theirs.loss_percent
        return found

    def _scored(self, point: Point, value: Value, base: Value, count: int) -> Row:
        return scored_row(point, value, base["windows"], count, self.place.window)


def _line(point: Point, row: Row) -> dict[str, Any]:
    return {
        "codec": row.name,
        "recipe": point.recipe,
        "bits": point.bits,
        "effective_bits": round(row.effective_bits, 4),
        "loss_percent": row.loss_percent,
        "loss_error": row.loss_error,
        "kl": row.score.kl,
        "kl_error": row.score.kl_error,
        "top1": row.score.top1,
    }


def collect(folder: Path) -> tuple[list[Scores], list[dict[str, Any]]]:
    """All shards of a folder, by place, and what they say of their runs."""
    values: dict[Place, dict[Point, Value]] = {}
    exact: dict[str, dict[str, float]] = {}
    runs = []
    for path in sorted(folder.glob("*.run")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs.append(run)
        for name, size in run["exact_bytes"].items():
            exact.setdefault(run["model"], {})[name] = 8 * size / run["elements"]
        for item in Results(path.with_suffix(".json")).to_dict()["results"]:
            identity = item["identity"]
            text = run["texts"][identity["text"]]
            place = Place(run["calibration"], text, identity["window"])
            point = Point(identity["recipe"], identity["bits"])
            known = values.setdefault(place, {})
            if len(item["value"]["windows"]) > len(known.get(point, {"windows": ()})["windows"]):
                known[point] = item["value"]
    if len(exact) != 1:
        raise SystemExit(f"{folder} holds runs of {len(exact)} models; one is wanted")
    bits = next(iter(exact.values()))
    found = [
        Scores(place, points, {n: b / place.window for n, b in bits.items()}, runs[0]["itemsize"])
        for place, points in values.items()
    ]
    return found, runs


def merged(folder: Path, least: int) -> dict[str, Any]:
    """The record of a folder."""
    scores, runs = collect(folder)
    main = next(run["calibration"] for run in runs if run["given"])
    given = [s for s in scores if s.place.calibration == main]
    points = [[p for p in s.values if p.recipe != ORIGINAL] for s in given]
    method = [[p for p in some if p.recipe in METHOD and p.bits.isdigit()] for some in points]
    return {
        "environment": runs[0]["environment"],
        "model": runs[0]["model"],
        "calibration": main,
        "tables": _tables(given, points, least),
        "method": _tables(given, method, least),
        "calibrations": crossed(scores, least),
        "failures": {name: why for run in runs for name, why in run["failures"].items()},
        "seconds": [run["seconds"] for run in runs],
    }


def crossed(scores: Sequence[Scores], least: int) -> list[dict[str, Any]]:
    """Every width of ours on a text by what it was calibrated on, each on the windows that it and
    the calibration on the same kind of text have in common."""
    lines = []
    for same in (s for s in scores if s.place.calibration == s.place.text):
        here = same.place.text, same.place.window
        others = [s for s in scores if s is not same and (s.place.text, s.place.window) == here]
        for found in (same, *others):
            for point in (p for p in same.values if p.recipe == OURS and p in found.values):
                count = min(len(s.values[point]["windows"]) for s in (found, same))
                if count >= least:
                    line = vars(found.place) | {"windows": count}
                    line |= _line(point, found.row(point, count))
                    lines.append(line | found.ratios(point, same, point, count))
    return sorted(
        lines, key=lambda line: (line["text"], line["window"], line["bits"]), reverse=True
    )


def _tables(
    scores: Sequence[Scores], points: Sequence[Sequence[Point]], least: int
) -> list[dict[str, Any]]:
    made = (s.table(some, least) for s, some in zip(scores, points, strict=True))
    return [table for table in made if table is not None]


def main() -> None:
    """Merge, and say what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--least", type=int, default=8, help="windows")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    record = merged(args.folder, args.least)
    save(args.json, record)
    for table in record["tables"]:
        place = f"{table['text']}, {table['window']}: {table['windows']} windows"
        print(f"{place}, {len(table['rows'])} codecs, left out: {table['left_out'] or 'none'}")
    for name, why in record["failures"].items():
        print(f"failed: {name}: {why}")


if __name__ == "__main__":
    main()
