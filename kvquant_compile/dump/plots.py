"""Statistics as SVG by matplotlib, in colours that the page decides.

matplotlib draws with placeholder colours, which become CSS variables of the page; text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from markupsafe import Markup

from kvquant_compile.dump.statistics import CELLS, PartStatistics
from kvquant_compile.errors import MissingDependencyError
from kvquant_compile.evaluate.stored import PARTS

MOST_HEADS = 4
# Placeholder -> variable of the page.
_COLOURS = {
    "#010203": "--ink", "#010204": "--soft", "#010205": "--line", "#010206": "--keys",
    "#010207": "--values", "#010208": "--accent",
}  # fmt: skip
# A tenth of a point is finer than any screen.
_PATH, _DIGITS = re.compile(r' d="[^"]*"'), re.compile(r"(\.\d)\d+")
_METADATA = ("Date", "Creator", "Format", "Type")
INK, SOFT, LINE, KEY_COLOUR, VALUE_COLOUR, ACCENT = _COLOURS
_BY_PART = dict(zip(PARTS, (KEY_COLOUR, VALUE_COLOUR), strict=True))


def sensitivity(statistics: Sequence[PartStatistics], mixed: Mapping[str, Any] | None) -> Markup:
    """What each layer's keys and values are expected to cost: measured where widths were chosen by
    measurement, from gradients otherwise; relative errors where there are neither."""
    losses, label = _losses(statistics, mixed)
    layers = sorted({s.index for s in statistics})
    with _figure("sensitivity", 9, 2.4) as (figure, out):
        axis = figure.subplots()
        for shift, part in zip((-0.2, 0.2), PARTS, strict=True):
            heights = [losses.get((index, part), 0.0) for index in layers]
            axis.bar([i + shift for i in range(len(layers))], heights, 0.38,
                     color=_BY_PART[part], label=part)  # fmt: skip
        axis.set_xticks(range(len(layers)), [str(i) for i in layers])
        axis.set(xlabel="cache layer", ylabel=label)
        axis.legend(frameon=False, loc="upper right", labelcolor=INK)
    return out[0]


def _losses(
    statistics: Sequence[PartStatistics], mixed: Mapping[str, Any] | None
) -> tuple[dict[tuple[int, str], float], str]:
    if mixed is not None:
        chosen = {}
        for name, width in mixed["widths"].items():
            index, part = name.split(".")
            chosen[int(index), part] = float(mixed["losses"][name][str(width)])
        return chosen, f"KL, nats a token\n({mixed['method']})"
    found = {(s.index, s.part): s.loss for s in statistics if s.loss is not None}
    if found:
        return found, "expected loss, nats a token\n(from gradients)"
    errors = {(s.index, s.part): s.error for s in statistics if s.error is not None}
    return errors, "squared error over variance"


def levels(statistics: Sequence[PartStatistics]) -> Markup:
    """The levels of one layer's tables over histograms of what they code, head by head."""
    rows = [s for s in statistics if s.normalised is not None]
    heads = min(MOST_HEADS, max(len(s.quantiles[0]) for s in rows))
    with _figure(f"levels {rows[0].index}", 9, 1.9 * len(rows)) as (figure, out):
        axes = figure.subplots(len(rows), heads, squeeze=False)
        for row, part in zip(axes, rows, strict=True):
            for head, axis in enumerate(row):
                axis.set_visible(head < len(part.quantiles[0]))
                if head < len(part.quantiles[0]):
                    _histogram(axis, part, head)
            row[0].set_ylabel(f"{part.part}\ndensity")
    return out[0]


def _histogram(axis: Any, part: PartStatistics, head: int) -> None:
    seen = part.normalised
    assert seen is not None
    places = torch.linspace(-seen.edge, seen.edge, CELLS + 1)
    axis.stairs(seen.density[head].tolist(), places.tolist(), fill=True,
                color=_BY_PART[part.part], alpha=0.35)  # fmt: skip
    top = float(seen.density[head].max())
    axis.vlines(seen.levels[head].tolist(), 0, 1.08 * top, color=INK, linewidth=0.9)
    axis.set(yticks=[], xlim=(-seen.edge, seen.edge), ylim=(0, 1.12 * top))
    axis.set_title(f"head {head}", fontsize=8, color=SOFT)


def ranges(statistics: Sequence[PartStatistics]) -> Markup:
    """Every channel's range in one layer: median, 1 % to 99 %, least to greatest."""
    heads = min(MOST_HEADS, max(len(s.quantiles[0]) for s in statistics))
    with _figure(f"ranges {statistics[0].index}", 9, 1.9 * len(statistics)) as (figure, out):
        axes = figure.subplots(len(statistics), heads, squeeze=False, sharey="row")
        for row, part in zip(axes, statistics, strict=True):
            for head, axis in enumerate(row):
                least, low, middle, high, most = (q[head].tolist() for q in part.quantiles)
                channels = range(len(middle))
                colour = _BY_PART[part.part]
                axis.fill_between(channels, least, most, color=colour, alpha=0.18, linewidth=0)
                axis.fill_between(channels, low, high, color=colour, alpha=0.45, linewidth=0)
                axis.plot(channels, middle, color=INK, linewidth=0.8)
                axis.set_title(f"head {head}", fontsize=8, color=SOFT)
                axis.margins(x=0)
            row[0].set_ylabel(part.part)
        axes[-1][0].set_xlabel("channel")
    return out[0]


def outliers(statistics: Sequence[PartStatistics]) -> Markup:
    """How often each channel is kept exactly, by layer and head (rows) and channel (columns)."""
    with _figure("outliers", 9, 2.6) as (figure, out):
        axes = figure.subplots(1, 2)
        for axis, part in zip(axes, PARTS, strict=True):
            rows = [s for s in statistics if s.part == part and s.normalised is not None]
            shares = torch.cat([s.normalised.outliers for s in rows if s.normalised is not None])
            heads = len(rows[0].quantiles[0])
            image = axis.imshow(shares.sqrt().numpy(), aspect="auto", cmap="viridis",
                                interpolation="nearest")  # fmt: skip
            step = max(1, -(-len(rows) // 8))
            axis.set_yticks([i * heads for i in range(0, len(rows), step)],
                            [str(rows[i].index) for i in range(0, len(rows), step)])  # fmt: skip
            axis.set(title=f"{part}: brightest {float(shares.max()):.0%} of tokens",
                     xlabel="channel", ylabel="layer, head")  # fmt: skip
            image.set_rasterized(True)
    return out[0]


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[tuple[Any, list[Markup]]]:
    """A figure to draw on; when it is left, the list holds its SVG.

    Ids are the same every time and differ from those of figures with other names.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots cannot be drawn",
            why="matplotlib is not installed",
            do='Run pip install "kvquant-compile[plot]".',
        ) from error
    style: Any = {
        "font.size": 8, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": name,
        "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": LINE, "xtick.color": SOFT,
        "ytick.color": SOFT, "axes.facecolor": "none", "figure.facecolor": "none",
        "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlecolor": INK, "legend.facecolor": "none",
    }  # fmt: skip
    out: list[Markup] = []
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, out
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(_METADATA))
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    for placeholder, variable in _COLOURS.items():
        text = text.replace(placeholder, f"var({variable})")
    text = _PATH.sub(lambda path: _DIGITS.sub(r"\1", " ".join(path[0].split())), text)
    out.append(Markup(text))
