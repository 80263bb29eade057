"""Tables of docs/accuracy.md: codecs against each other, and calibration texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import Record, markdown

OURS = "kvquant+"
NAMES = {"wikitext2_test": "WikiText-2", "c4_val_2k": "C4", "emma": "*Emma*"}


def pareto(record: Record) -> str:
    """All codecs, a table for every text and window."""
    return "\n\n".join(_table(table) for table in record["tables"])


def method(record: Record) -> str:
    """The same for kvquant+ and the method as published, on all windows that they have."""
    return "\n\n".join(_table(table) for table in record["method"])


def at_equal_bytes(record: Record) -> str:
    """All codecs by their bytes, in the shortest windows of every text."""
    shortest = min(table["window"] for table in record["tables"])
    tables = [table for table in record["tables"] if table["window"] == shortest]
    texts = [{row["codec"]: row for row in table["rows"]} for table in tables]
    common = [rows for rows in texts[0].values() if all(rows["codec"] in t for t in texts)]
    head = ["codec", "effective bits"]
    for table in tables:
        name = NAMES.get(table["text"], table["text"])
        head += [f"{name} ({table['windows']}): loss", "KL"]
    return markdown(head, (
        _across([rows[row["codec"]] for rows in texts])
        for row in sorted(common, key=lambda r: (-r["effective_bits"], r["kl"]))
    ))  # fmt: skip


SHORT = ("fp8", "kivi", "qserve", "int", "rvq", "kvquant-released")
"""Recipes that are shown beside ours where there is room for few."""


def short(record: Record) -> str:
    """Some codecs in the shortest windows of the first text, by their bytes."""
    table = min(record["tables"], key=lambda t: (t["text"] != "wikitext2_test", t["window"]))
    rows = [row for row in table["rows"] if row["recipe"] in (OURS, *SHORT)]
    rows.sort(key=lambda r: (-r["effective_bits"], r["kl"]))
    cells = ([_name(row), f"{row['effective_bits']:.2f}", _loss(row), _kl(row)] for row in rows)
    return markdown(["", "effective bits", "loss of perplexity", "KL to the original"], cells)


def calibrations(record: Record) -> str:
    """What kvquant+ loses by what it was calibrated on, and how much more than calibrated on text
    of the same kind."""
    head = ["scored on, bits", "calibrated on", "windows", "loss", "KL"]
    over = ["perplexity over the same kind's", "times its loss", "times its KL"]
    return markdown([*head, *over], (_calibration(line) for line in record["calibrations"]))


def draws(record: Record) -> str:
    """What kvquant+ loses by what it was calibrated on, in the mean over draws, and over what it
    loses calibrated on the same kind of text."""
    rows = record["rows"]
    sources = [name for name in NAMES if any(name in row["calibrations"] for row in rows)]
    head = ["scored on, bits", "own text", "draws", "the same kind"]
    head += [NAMES[name] for name in sources] + ["its own samples"]
    lines = []
    for row in rows:
        found = row["calibrations"]
        same = found[row["text"]]
        number = " or ".join(map(str, sorted({len(mean["seeds"]) for mean in found.values()})))
        cells = [f"{NAMES.get(row['text'], row['text'])}, {row['bits']}", f"{row['own_text']:g}"]
        cells += [number, _draw(same, None)]
        others = [{} if name == row["text"] else found.get(name, {}) for name in sources]
        lines.append(cells + [_draw(mean, same) for mean in (*others, found.get("none", {}))])
    return markdown(head, lines)


def _draw(mean: Mapping[str, Any], same: Mapping[str, Any] | None) -> str:
    """Loss and divergence, and how many times those of the same kind of text."""
    if not mean:
        return ""
    loss, kl = f"{mean['loss_percent']:+.2f} %", f"{mean['kl']:.5f}"
    if same is None:
        return f"{loss} · {kl}"
    times = (mean[what] / same[what] for what in ("loss_percent", "kl"))
    return " · ".join(f"{x} ({y:.2f})" for x, y in zip((loss, kl), times, strict=True))


def calibrating(record: Record) -> str:
    """Seconds of ``optimize``."""
    lines = []
    for row in record["rows"]:
        on = row["calibrated_on"]
        where = row["device"] if row["device"] != "cpu" else f"cpu, {row['threads']} threads"
        peak = f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else ""
        lines.append([
            f"{row['model']}, {row['dtype']}", where,
            f"{on['windows']} windows, {on['tokens']:,} tokens, {on['source']}",
            f"{row['seconds']:.1f}", f"{row['weights_bytes'] / 1e9:.1f}", peak,
        ])  # fmt: skip
    head = ["model", "on", "calibrated on", "seconds", "weights, GB", "peak, GB"]
    return markdown(head, lines)


def _calibration(line: Mapping[str, Any]) -> list[str]:
    kind = {"none": "its own samples", line["text"]: "the same kind"}
    source = kind.get(line["calibration"], NAMES.get(line["calibration"], "another text"))
    return [
        f"{NAMES.get(line['text'], line['text'])}, {line['bits']}", source, str(line["windows"]),
        _loss(line), _kl(line), *_ratios(line),
    ]  # fmt: skip


def _table(table: Mapping[str, Any]) -> str:
    """Codecs by width, the least divergence first."""
    rows = sorted(table["rows"], key=lambda r: (-_width(r), r["kl"]))
    name = NAMES.get(table["text"], table["text"]).strip("*")
    title = (
        f"**{name}, {table['windows']} windows of {table['window']} tokens**, perplexity of the"
        f" original {table['perplexity']:.2f}:"
    )
    head = ["codec", "effective bits", "loss", "KL"]
    over = ["perplexity over that of kvquant+", "times its loss", "times its KL"]
    body = markdown([*head, *over], (_codec(row) for row in rows))
    left = f"\n\nToo few windows in time: {', '.join(table['left_out'])}." * bool(table["left_out"])
    return f"{title}\n\n{body}{left}"


def _width(row: Mapping[str, Any]) -> float:
    """By which a table is ordered: codes of keys and values in the mean, or a budget."""
    return float(row["bits"].removeprefix("auto:") or 99)


def _across(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A codec on several texts; * where it is on the front of all of them."""
    scores = [cell for row in rows for cell in (_loss(row), _kl(row))]
    best = all(row["best"] for row in rows)
    return [_name(rows[0]) + " *" * best, f"{rows[0]['effective_bits']:.2f}", *scores]


def _name(row: Mapping[str, Any]) -> str:
    ours = row["recipe"].partition("@")[0] == OURS
    return f"**{row['codec']}**" if ours else str(row["codec"])


def _codec(row: Mapping[str, Any]) -> list[str]:
    return [
        _name(row) + " *" * row["best"], f"{row['effective_bits']:.2f}", _loss(row), _kl(row),
        *_ratios(row),
    ]  # fmt: skip


def _ratios(row: Mapping[str, Any]) -> list[str]:
    """Against the point that a table compares with."""
    if "over_percent" not in row:
        return [""] * 3
    over = f"{row['over_percent']:+.2f}{_error(row['over_error'], 2)} %"
    return [over, _times(row.get("times_loss")), _times(row["times_kl"])]


def _times(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.2f}"


def _loss(row: Mapping[str, Any]) -> str:
    return f"{row['loss_percent']:+.2f}{_error(row['loss_error'], 2)} %"


def _kl(row: Mapping[str, Any]) -> str:
    return f"{row['kl']:.5f}{_error(row['kl_error'], 5)}"


def _error(error: float | None, digits: int) -> str:
    return "" if error is None else f" ± {error:.{digits}f}"
