"""A report as a piece of HTML, for notebooks: no script, no address, one scoped style."""

from __future__ import annotations

from kvquant_compile.inspect.facts import COLUMNS, cells, details, facts, groups, headline
from kvquant_compile.inspect.report import Report
from kvquant_compile.inspect.templates import render


def as_html(report: Report) -> str:
    """The report as one ``div``."""
    return render(
        "notebook.html.j2",
        headline=headline(report),
        columns=COLUMNS,
        rows=[cells(group) for group in groups(report.layers)],
        details=details(report.layers),
        certificates={layer.index: sorted(layer.certificate.items()) for layer in report.layers},
        facts=facts(report),
        refused=report.refused,
        sources=report.sources,
    )
