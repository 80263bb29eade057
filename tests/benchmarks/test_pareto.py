"""Shards of the Pareto benchmark are compared on the same windows, at their bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy_tables import calibrations, pareto
from benchmarks.pareto_merge import merged
from kvquant_compile.evaluate.results import Results

BASE = 2.0


def shard(folder: Path, name: str, calibration: str, points: dict[str, Any]) -> None:
    """Points: "recipe bits" -> (effective bits, windows as (loss, divergence))."""
    results = Results(folder / f"{name}.json")
    longest = max(len(windows) for _, windows in points.values())
    every = {"original": (32.0, [(BASE, 0.0)] * longest), **points}
    for point, (bits, windows) in every.items():
        recipe, _, width = point.partition(" ")
        identity = {"measure": "score", "recipe": recipe, "bits": width, "text": "d", "window": 64}
        rows = [{"loss": loss, "kl": kl, "top1": 0.5} for loss, kl in windows]
        results.put(identity, {"effective_bits": bits, "cache_bytes": None, "windows": rows})
    run = {
        "environment": {}, "model": "m", "calibration": calibration, "given": calibration == "c",
        "texts": {"d": "emma"}, "elements": 4, "exact_bytes": {"kivi 2": 64}, "itemsize": 4,
        "failures": {}, "seconds": {},
    }  # fmt: skip
    (folder / f"{name}.run").write_text(json.dumps(run))


def windows(loss: float, divergence: float, count: int) -> list[tuple[float, float]]:
    """The last one is much worse than the others."""
    return [(BASE + loss, divergence)] * (count - 1) + [(9.0, 9.0)]


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    shard(tmp_path, "a", "emma", {"kvquant+ 2": (2.4, windows(0.01, 0.03, 4))})
    shard(tmp_path, "b", "c", {"kvquant+ 2": (2.4, windows(0.02, 0.04, 5))})
    slow = {"kivi 2": (4.0, windows(0.06, 0.08, 4)[:3]), "gear 2": (2.0, [(3.0, 1.0)])}
    shard(tmp_path, "c", "c", slow)
    return merged(tmp_path, least=2)


def test_codecs_are_compared_on_the_windows_that_all_have(record: dict[str, Any]) -> None:
    (table,) = record["tables"]
    assert (table["text"], table["window"], table["windows"]) == ("emma", 64, 3)
    assert table["left_out"] == ["gear 2"]
    assert table["perplexity"] == pytest.approx(math.exp(BASE))
    ours, kivi = table["rows"]
    assert ours["loss_percent"] == pytest.approx(100 * math.expm1(0.02))
    assert kivi["kl"] == pytest.approx(0.08)
    assert kivi["times_loss"] == pytest.approx(math.expm1(0.06) / math.expm1(0.02))
    assert kivi["times_kl"] == pytest.approx(2)
    assert (ours["best"], kivi["best"]) == (True, False)


def test_a_loss_within_its_error_is_no_denominator(record: dict[str, Any]) -> None:
    same, other = record["calibrations"]
    assert 0 < same["loss_percent"] < 2 * same["loss_error"]
    assert "times_loss" not in other


def test_exact_tokens_count_16_bits(record: dict[str, Any]) -> None:
    ours, kivi = record["tables"][0]["rows"]
    assert ours["effective_bits"] == 2.4
    assert kivi["effective_bits"] == 4.0 - 0.5 * 8 * 64 / (4 * 64)


def test_calibrations_are_compared_with_one_on_the_same_kind_of_text(
    record: dict[str, Any],
) -> None:
    same, other = record["calibrations"]
    assert (same["calibration"], other["calibration"]) == ("emma", "c")
    assert same["windows"] == other["windows"] == 4
    assert "times_kl" not in same
    assert other["times_kl"] == pytest.approx(0.04 / same["kl"])
    assert other["over_percent"] == pytest.approx(
        100 * math.expm1((3 * 0.01 + BASE + 0.02 - 9) / 4)
    )
    text = calibrations(record)
    assert "| *Emma*, 2 | the same kind | 4 |" in text


def test_the_page_names_what_is_left_out(record: dict[str, Any]) -> None:
    page = pareto(record)
    assert page.startswith("**Emma, 3 windows of 64 tokens**")
    assert "| **kvquant+ 2** * | 2.40 | +2.02 ± 0.00 % |" in page
    assert page.endswith("Too few windows in time: gear 2.")


def test_nothing_is_compared_with_a_codec_that_has_too_few_windows(tmp_path: Path) -> None:
    shard(tmp_path, "a", "c", {"kvquant+ 2": (2.4, windows(0.02, 0.04, 5)[:1])})
    others = {"kivi 2": (4.0, windows(0.06, 0.08, 4)), "gear 2": (2.0, windows(0.05, 0.07, 4))}
    shard(tmp_path, "b", "c", others)
    (table,) = merged(tmp_path, least=2)["tables"]
    assert table["left_out"] == ["kvquant+ 2"]
    assert [row["codec"] for row in table["rows"]] == ["kivi 2", "gear 2"]
    assert not any("times_kl" in row for row in table["rows"])
