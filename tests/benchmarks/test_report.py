"""The tables of docs/performance.md are what the recorded results say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

DECODE: dict[str, Any] = {
    "environment": {"device": "a device", "torch": "1.2", "date": "2026-01-02"},
    "bandwidth": {"read": 4e12, "copy": 3e12},
    "notes": ["something to know"],
    "rows": [
        {
            "size": "32/8 x 1M",
            "results": {
                "cudnn fp16": {"us": 99.0},
                "cudnn bf16": {"us": 120.0},
                "flash bf16": {"us": 100.0},
                "flex bf16": {"error": "no"},
                "fp8": {"us": 80.0, "bytes_per_second": 2e12},
                "3 bit": {"us": 25.0, "bytes_per_second": 3e12},
                "2 bit": {"error": "no"},
            },
        }
    ],
}


def in_rounds() -> dict[str, Any]:
    """The record above as alternating rounds write it, with a ring among the formats."""
    record = copy.deepcopy(DECODE)
    row = record["rows"][0]
    row |= {"schedule": {"rounds": 5}, "query_heads": 32, "kv_heads": 8, "batch": 1, "dim": 128,
            "tokens": 2**20}  # fmt: skip
    row["results"]["3 bit, last 16 exact"] = {"us": 40.0, "bytes_per_second": 2e12}
    for name, us in (("cudnn bf16", 108.0), ("flash bf16", 110.0), ("3 bit", 30.0)):
        row["results"][name] |= {"sustained_us": us, "rounds_us": [us]}
    return record


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.name)
def test_pages_show_the_recorded_results(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert report.rewritten(page) == page, "run python -m benchmarks.report"
    kinds = [match[1] for match in report.MARKED.findall(page)]
    assert len(kinds) == page.count("<!-- table ") == page.count("<!-- end -->") > 0
    assert set(kinds) <= set(report.KINDS)


def test_every_decode_record_is_on_the_page() -> None:
    page = report.PAGES[0].read_text(encoding="utf-8")
    names = [path.stem for path in report.RESULTS.glob("decode-*.json")]
    assert names
    assert all(f"<!-- table decode {name} -->" in page for name in names)


def test_ratios_are_against_the_fastest_bfloat16_peer(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(DECODE))
    text = report.section("decode", "x", tmp_path)
    assert "| 32/8 x 1M | 100.0 (flash bf16) | 80.0 · 1.25x · 2.00 (50 %) |" in text
    assert "25.0 · 4.00x · 3.00 (75 %) | failed |" in text
    assert "a device, torch 1.2, 2026-01-02." in text
    assert "4.00 TB/s reading, 3.00 TB/s copying. Something to know." in text
    assert "fp16" not in text
    peers = report.section("peers", "x", tmp_path)
    assert "| 32/8 x 1M | 99.0 | 120.0 | 100.0 | failed |" in peers


def test_sustained_ratios_are_among_sustained_times(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(in_rounds()))
    text = report.section("sustained", "x", tmp_path)
    row = "| 32/8 x 1M | 108.0 (cudnn bf16) | failed | 30.0 · 3.60x | failed | failed |"
    assert row in text
    assert "copying. Medians of 5 alternating rounds, without rests. Something" in text
    assert "| 40.0 · 2.50x · 2.00 (50 %) |" in report.section("decode", "x", tmp_path)
    rested = in_rounds()
    rested["rows"][0]["schedule"]["pause_seconds"] = 0.05
    (tmp_path / "z.json").write_text(json.dumps(rested))
    assert "rounds, 50 ms of rest before each slice." in report.section("sustained", "z", tmp_path)
    short = in_rounds()
    short["rows"][0]["results"]["flash bf16"]["us"] = 99.0
    for record in (DECODE, short):  # without such times, or below the power limit
        (tmp_path / "y.json").write_text(json.dumps(record))
        assert report.section("sustained", "y", tmp_path).startswith("Not measured in this run.")


def test_old_and_new_records_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    from benchmarks.plots import plot_decode

    drawn = []
    for name, times in (("new", True), ("old", False)):
        record = in_rounds()
        for result in record["rows"][0]["results"].values() if not times else ():
            result.pop("sustained_us", None)
        plot_decode(record, tmp_path / f"{name}.svg")
        drawn.append((tmp_path / f"{name}.svg").read_text())
    assert all("3 bit, last 16 exact" in text for text in drawn)
    assert drawn[0] != drawn[1]


def test_the_summary_takes_ratios_at_a_few_sizes(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(DECODE))
    text = report.section("summary", "x", tmp_path)
    assert "| 32/8 x 1M | 100 us (flash bf16) | 1.25x |  | 4.00x |  |  |" in text


def test_a_rewritten_page_keeps_everything_else(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(DECODE))
    first, second = "<!-- table decode x -->\nold\n", "<!-- table model y -->\n"
    page = f"before\n{first}<!-- end -->\nafter\n{second}<!-- end -->\n"
    once = report.rewritten(page, tmp_path)
    assert once.startswith("before\n<!-- table decode x -->\n| query")
    assert "old" not in once
    assert "<!-- end -->\nafter\n<!-- table model y -->\nNot measured yet.\n<!-- end -->\n" in once
    assert report.rewritten(once, tmp_path) == once


def test_steps_are_compared_with_the_original_at_the_same_size(tmp_path: Path) -> None:
    def row(contender: str, tokens: int, ms: float, **more: Any) -> dict[str, Any]:
        return {"shape": "s", "contender": contender, "batch": 1, "tokens": tokens, "ms": ms,
                "tokens_per_second": 1e3 / ms, "peak_bytes": 2e9, "dense_cache_bytes": 1e9,
                **more}  # fmt: skip

    rows = [row("ours", 10, 2.0, cache_bytes=3e8), row("static", 10, 5.0),
            row("dynamic", 10, 4.0), row("static", 99, 1.0),
            {"contender": "quantised", "error": "no"}]  # fmt: skip
    record = {"environment": DECODE["environment"], "rows": rows}
    (tmp_path / "m.json").write_text(json.dumps(record))
    text = report.section("model", "m", tmp_path)
    assert "| s, ours | 1 x 10 | 2.00 | 500.0 | 2.00x | 2.0 | 0.30 |" in text
    assert "| s, static | 1 x 10 | 5.00 | 200.0 | 0.80x | 2.0 | 1.00 at 16 bits |" in text


@pytest.mark.parametrize(("kind", "name"), [("prefill", "p"), ("compile", "c"), ("append", "a")])
def test_other_tables(kind: str, name: str, tmp_path: Path) -> None:
    environment = DECODE["environment"]
    records: dict[str, Any] = {
        "p": {"environment": environment, "rows": [{"tokens": 32768, "results": {
            "original": {"seconds": 2.0, "peak_bytes": 2e10},
            "ours": {"seconds": 2.1, "peak_bytes": 1e10}}}]},
        "c": {"environment": environment, "layers": 32, "kernels": {"a": 1, "b": 2},
              "cold": {"optimise": 8.0}, "warm": {"optimise": 4.0}},
        "a": {"environment": environment, "rows": [
            {"bits": 3, "batch": 1, "tokens": 2048, "graph": 90.04, "launched": 120.0,
             "copy, graph": 5.5}]},
    }  # fmt: skip
    (tmp_path / f"{name}.json").write_text(json.dumps(records[name]))
    text = report.section(kind, name, tmp_path)
    expected = {
        "p": "| ours | 32,768 | 2.100 | 1.050 | 10.0 |",
        "c": "| optimise | 8.00 | 4.00 |",
        "a": "| 1 x 2,048 | 3 | 90.0 | 120.0 | 5.5 |",
    }
    assert expected[name] in text
    assert name != "c" or "3 kernels compiled for 32 layers." in text


def test_a_chunk_that_failed_leaves_the_others(tmp_path: Path) -> None:
    row = {"chunk": 2048, "history": 0, "flash bf16": {"us": 3000.0}, "cudnn bf16": {"us": 2000.0},
           "3 bits, plain": {"us": 2500.0}, "3 bits, default": {"error": "no"}}  # fmt: skip
    broken = row | {"flash bf16": {"error": "no"}}
    record = {"environment": DECODE["environment"], "rows": [row, broken, {"dequantise": "x"}]}
    (tmp_path / "k.json").write_text(json.dumps(record))
    text = report.section("chunks", "k", tmp_path)
    assert "| 2,048 over 0 | 3.00 | 2.00 | 2.50 · 1.20x · 0.80x | failed |" in text
    assert "| 2,048 over 0 | failed | 2.00 | 2.50 · 0.80x | failed |" in text
