"""Plots of docs/results as SVG in docs (needs the extra ``plot``).

python -m benchmarks.plots
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.report import RESULTS, ROOT, best_peer, contenders, is_16_bit, loaded

matplotlib.rcParams["svg.hashsalt"] = "kvquant"  # the same file from the same numbers
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
matplotlib.rcParams["font.size"] = 9


def plot_decode(record: dict[str, Any], path: Path) -> None:
    """Time over tokens, and the ratio to the best bfloat16 peer, of batch 1 with grouped heads."""
    rows = [r for r in record["rows"] if (r["query_heads"], r["kv_heads"]) == (32, 8)]
    rows = [r for r in rows if r["batch"] == 1 and r["dim"] == 128]
    names = [n for n in contenders(rows) if n != "flex bf16"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for i, name in enumerate(names):
        points = [(r["tokens"], r["results"][name]["us"], best_peer(r["results"])[1])
                  for r in rows if "us" in r["results"].get(name, {})]  # fmt: skip
        if not points:
            continue
        tokens, times, dense = zip(*points, strict=True)
        dashes = "--" if is_16_bit(name) or name == "fp8" else "-"
        style: dict[str, Any] = {
            "color": plt.get_cmap("tab20")(i),
            "linestyle": dashes,
            "marker": ".",
            "label": name,
        }
        left.loglog(tokens, times, **style)
        if not is_16_bit(name):
            ratios = [d / t for d, t in zip(dense, times, strict=True)]
            right.semilogx(tokens, ratios, **style)
            _plot_sustained(right, rows, name, style["color"])
    right.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="cached tokens", ylabel="microseconds", title="32/8 heads, 128 channels")
    right.set(xlabel="cached tokens", ylabel="times faster than the best bf16 peer")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    environment = record["environment"]
    _save(figure, path, f"{environment['device']}, {environment['date']}")


def _plot_sustained(axis: Any, rows: list[dict[str, Any]], name: str, color: Any) -> None:
    """Open circles: ratios of contenders that ran alone for a while, at the power limit."""
    for row in (r for r in loaded(rows) if "sustained_us" in r["results"].get(name, {})):
        peer = best_peer(row["results"], "sustained_us")[1]
        ratio = peer / row["results"][name]["sustained_us"]
        axis.plot(row["tokens"], ratio, "o", color=color, fillstyle="none", markersize=5)


def plot_model(record: dict[str, Any], path: Path) -> None:
    """Tokens per second of whole decode steps."""
    rows = [r for r in record["rows"] if "ms" in r]
    settings = sorted({(r["batch"], r["tokens"]) for r in rows})
    names = list(dict.fromkeys(r["contender"] for r in rows))
    figure, axis = plt.subplots(figsize=(8, 4))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = {(r["batch"], r["tokens"]): r["tokens_per_second"] for r in rows
                if r["contender"] == name}  # fmt: skip
        places = [j + i * width for j, s in enumerate(settings) if s in mine]
        axis.bar(places, [mine[s] for s in settings if s in mine], width, label=name)
    labels = [f"{b} x {n // 1024}k" for b, n in settings]
    axis.set_xticks([j + 0.4 - width / 2 for j in range(len(settings))], labels)
    axis.set(ylabel="tokens per second", xlabel="batch x context", yscale="log")
    axis.legend(fontsize=7)
    environment = record["environment"]
    _save(figure, path, f"{rows[0]['shape']}, {environment['device']}, {environment['date']}")


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main() -> None:
    """One plot of every decode and model record."""
    kinds = {"decode": plot_decode, "model": plot_model}
    for path in sorted(RESULTS.glob("*.json")):
        draw = kinds.get(path.stem.split("-")[0])
        if draw is not None:
            draw(json.loads(path.read_text()), ROOT / "docs" / f"{path.stem}.svg")


if __name__ == "__main__":
    main()
