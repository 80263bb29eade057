"""The Pareto front of divergence against effective bits, and its plot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate.points import ORIGINAL
from kvquant_compile.evaluate.table import Row


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
    recipes = itertools.groupby(
        (row for row in rows if row.name != ORIGINAL), key=lambda row: row.name.split(" ")[0]
    )
    for number, (recipe, group) in enumerate(recipes):
        members = sorted(group, key=lambda row: row.effective_bits)
        bits = [row.effective_bits for row in members]
        style = {"marker": "o", "markersize": 3.5, "linewidth": 1, "color": f"C{number % 10}"}
        style["marker"] = "os^Dv"[number // 2 % 5]
        axes[0].semilogy(bits, [row.score.kl for row in members], label=recipe, **style)
        axes[1].plot(bits, [row.loss_percent for row in members], label=recipe, **style)
    best = front(rows)
    axes[0].semilogy(
        [row.effective_bits for row in best], [row.score.kl for row in best],
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
