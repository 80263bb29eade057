"""The Pareto front of divergence against effective bits, and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate.points import ORIGINAL
from kvquant_compile.evaluate.table import Row

_LEAST = 1e-8  # what a logarithmic axis shows of nothing


def front(rows: Sequence[Row]) -> list[Row]:
    """Rows, by bits, that no other equals or beats in effective bits and divergence at once; the
    original is left out."""
    codecs = sorted(
        (row for row in rows if row.name != ORIGINAL),
        key=lambda row: (row.effective_bits, row.score.kl),
    )
    best: list[Row] = []
    for row in codecs:
        if not best or row.score.kl < best[-1].score.kl:
            best.append(row)
    return best


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Divergence, and loss of perplexity, over effective bits; the file's ending is its format.

    Raises:
        OptionError: matplotlib is not installed, or the file cannot be written.
    """
    figure, axes = _subplots()
    for number, (series, members) in enumerate(_series(rows).items()):
        bits = [row.effective_bits for row in members]
        style = {
            "marker": "os^Dv"[number % 5],
            "markersize": 3.5,
            "linewidth": 1,
            "color": f"C{number % 10}",
            "label": series,
        }
        axes[0].semilogy(bits, [max(row.score.kl, _LEAST) for row in members], **style)
        axes[1].plot(bits, [row.loss_percent for row in members], **style)
    best = front(rows)
    axes[0].semilogy(
        [row.effective_bits for row in best], [max(row.score.kl, _LEAST) for row in best],
        color="black", linewidth=4, alpha=0.12, label="Pareto front",
    )  # fmt: skip
    axes[0].set(ylabel="KL to the original, nats")
    axes[1].set(ylabel="loss of perplexity, %")
    axes[1].set_yscale("symlog", linthresh=0.5)
    for axis in axes:
        axis.set(xlabel="effective bits")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--plot {path}", why=str(error), do="Name a .svg, .png or .pdf file."
        ) from error


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by recipe, mixtures of widths on their own, each by effective bits."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.effective_bits):
        recipe, _, bits = row.name.partition(" ")
        if row.name != ORIGINAL:
            mixed = "." in bits or "auto" in bits
            found.setdefault(f"{recipe} mixed" if mixed else recipe, []).append(row)
    return found


def _subplots() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "--plot",
            why="matplotlib is not installed",
            do='Run pip install "kvquant-compile[plot]".',
        ) from error
    figure = Figure(figsize=(10, 4))
    return figure, figure.subplots(1, 2)
