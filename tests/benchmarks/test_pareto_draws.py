"""Draws of a calibration are averaged, on the windows that all of a text's have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy_tables import draws as table
from benchmarks.pareto_draws import draws, summed
from kvquant_compile.evaluate.results import Results

BASE = 2.0


def shard(
    folder: Path, calibration: str, seed: int, losses: list[float], own: float | None
) -> None:
    """A file of one calibration: windows of "emma" at 2 bits, divergence twice the loss."""
    name = f"{calibration}-{seed}-{own}"
    results = Results(folder / f"{name}.json")
    exact = [0.0] * len(losses)
    for recipe, bits, lost in (("original", "", exact), ("kvquant+", "2", losses),
                               ("kvquant+", "auto:2", losses), ("kivi", "2", losses)):  # fmt: skip
        identity = {
            "measure": "score", "recipe": recipe, "bits": bits, "text": "d", "window": 64,
            "calibration": {"own_text": own, "seed": seed},
        }  # fmt: skip
        rows = [{"loss": BASE + x, "kl": 2 * x, "top1": 0.5} for x in lost]
        results.put(identity, {"effective_bits": 2.4, "cache_bytes": None, "windows": rows})
    run = {"calibration": calibration, "texts": {"d": "emma"}}
    (folder / f"{name}.run").write_text(json.dumps(run))


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    shard(tmp_path, "emma", 0, [0.01, 0.03, 9.0], 0.5)
    shard(tmp_path, "emma", 1, [0.02, 0.02], 0.5)
    shard(tmp_path, "c4_val_2k", 0, [0.03, 0.05], 0.5)
    shard(tmp_path, "c4_val_2k", 0, [0.07, 0.01], 0.75)  # nothing to compare it with
    shard(tmp_path, "none", 0, [0.04, 0.02], None)
    shard(tmp_path, "none", 1, [9.0], None)  # too few windows
    return summed(draws(tmp_path), least=2)


def test_means_over_draws_on_common_windows(rows: list[dict[str, Any]]) -> None:
    (row,) = rows
    assert (row["text"], row["bits"], row["own_text"], row["windows"]) == ("emma", "2", 0.5, 2)
    same, other, none = (row["calibrations"][name] for name in ("emma", "c4_val_2k", "none"))
    assert [same["seeds"], other["seeds"], none["seeds"]] == [[0, 1], [0], [0]]
    assert same["loss_percent"] == pytest.approx(100 * math.expm1(0.02))
    assert other["loss_percent"] == pytest.approx(100 * math.expm1(0.04))
    assert (same["kl"], none["kl"]) == (pytest.approx(0.04), pytest.approx(0.06))


def test_a_table_says_how_much_more_is_lost(rows: list[dict[str, Any]]) -> None:
    head, _, line = table({"rows": rows}).splitlines()
    assert head.count("C4") == 1
    assert "*Emma*, 2 | 0.5 | 1 or 2 | +2.02 % · 0.04000 | +4.08 % (2.02) · 0.08000 (2.00)" in line
    assert "0.06000 (1.50) |" in line
