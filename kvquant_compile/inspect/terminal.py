"""A report on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from kvquant_compile.inspect.facts import COLUMNS, Fact, cells, details, facts, groups, headline
from kvquant_compile.inspect.layer import LayerReport
from kvquant_compile.inspect.report import Report
from kvquant_compile.inspect.source import LayerSource
from kvquant_compile.lowering.source import language

WIDTH = 150


def rendered(report: Report) -> Group:
    """Headline, table, every kind of layer in detail, totals, and sources where asked for."""
    parts: list[RenderableType] = [Text(headline(report), style="bold"), _table(report)]
    for span, found in details(report.layers):
        parts += [Text(f"\n{_layers(span)}", style="bold"), _listed(found)]
    parts += [Text(""), *_sentences(facts(report))]
    parts += [_refusal(layer) for layer in report.layers if layer.refusal]
    for source in report.sources:
        parts += _source(source)
    return Group(*parts)


def as_text(report: Report) -> str:
    """The same as plain text, :data:`WIDTH` columns wide."""
    console = Console(width=WIDTH, record=False)
    with console.capture() as capture:
        console.print(report)
    return capture.get()


def _table(report: Report) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name)
    for group in groups(report.layers):
        table.add_row(*cells(group))
    return table


def _listed(found: Sequence[Fact]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for fact in found:
        grid.add_row(fact.name, Text(fact.text))
    return Padding(grid, (0, 0, 0, 2))


def _sentences(found: Sequence[Fact]) -> list[Text]:
    return [Text.assemble((f"{fact.name}: ", "dim"), fact.text) for fact in found]


def _refusal(layer: LayerReport) -> Text:
    return Text(f"layer {layer.index}: keys kept rotated: {layer.refusal}", style="yellow")


def _layers(span: str) -> str:
    return f"layer {span}" if span.isdigit() else f"layers {span}"


def _source(source: LayerSource) -> list[RenderableType]:
    if source.reason:
        return [Text("\n" + str(source))]
    parts: list[RenderableType] = []
    for name, text in source.kernels.items():
        parts.append(Text("\n" + source.heading(name), style="bold"))
        code = Syntax("", language(text), background_color="default").highlight(text)
        code.no_wrap, code.overflow = True, "ignore"  # lines stay whole, so that they can be copied
        parts.append(code)
    return parts
