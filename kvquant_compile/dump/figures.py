"""Which plots a page has, with what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kvquant_compile.dump import plots
from kvquant_compile.dump.statistics import PartStatistics
from kvquant_compile.errors import MissingDependencyError
from kvquant_compile.inspect.report import Report

NOTHING_SEEN = (
    "Calibration saw no activations (lossless pages, a recipe without tables, or tables from an"
    " artifact), so there is nothing to plot them against."
)


@dataclass(frozen=True)
class Plot:
    """A titled drawing."""

    title: str
    meaning: str
    svg: Markup


def drawn(statistics: Sequence[PartStatistics], report: Report) -> dict[str, Any]:
    """``plots`` for the page's template, or why there are none."""
    if not statistics:
        return {"plots": None, "why_no_plots": NOTHING_SEEN}
    try:
        return {"plots": _plots(statistics, report), "why_no_plots": ""}
    except MissingDependencyError as error:
        return {"plots": None, "why_no_plots": str(error)}


def _plots(statistics: Sequence[PartStatistics], report: Report) -> dict[str, Any]:
    with_tables = [s for s in statistics if s.normalised is not None]
    whole = [
        Plot("Sensitivity by layer",
             "What quantising one layer's keys or values is expected to cost the model.",
             plots.sensitivity(statistics, report.calibration.get("mixed"))),
    ]  # fmt: skip
    if with_tables:
        whole.append(
            Plot("Outliers",
                 "How often a channel is among those that a token keeps exactly: stripes are"
                 " channels that are large for every token.",
                 plots.outliers(with_tables))
        )  # fmt: skip
    layers = []
    for index in sorted({s.index for s in statistics}):
        own = [s for s in statistics if s.index == index]
        tables = [s for s in own if s.normalised is not None]
        figures = [
            Plot("Range of every channel", "Median, 1 % to 99 % (dark), least to greatest (light).",
                 plots.ranges(own))
        ]  # fmt: skip
        if tables:
            figures.insert(
                0,
                Plot("Levels over what they code",
                     "Lines are the table's levels; behind them the histogram of calibration's"
                     " keys and values in the table's units, token by token scaled.",
                     plots.levels(tables)),
            )  # fmt: skip
        layers.append({"index": index, "plots": figures})
    return {"whole": whole, "layers": layers}
