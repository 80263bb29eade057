"""The page of a dump: one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from kvquant_compile.dump import figures
from kvquant_compile.dump.code import highlighted, style
from kvquant_compile.dump.pairs import Pair, pairs
from kvquant_compile.dump.roles import MEANING, Role
from kvquant_compile.dump.snapshot import GraphView
from kvquant_compile.dump.statistics import PartStatistics
from kvquant_compile.dump.text import changes, count_changes, graph_lines, node_line
from kvquant_compile.inspect.facts import COLUMNS, cells, details, facts, groups, headline, indices
from kvquant_compile.inspect.report import Report
from kvquant_compile.inspect.templates import asset, render

STAGES = {
    "exported": "the model as torch.export traces it, hooks in place",
    "captured": "append, mask and attention are single marked nodes; sizes come from one input",
    "absorbed": "latent attention attends to the latents",
    "recognised": "rotations are proved; keys have a place before them",
    "rewritten": "markers become ops on packed pages, tables become constants",
    "positions from slots": "positions that count columns are read on the device",
    "dead code eliminated": "masks, full-length keys and unused inputs are gone",
}


_VERSIONS = ("torch", "transformers")
SECTIONS = ("passes", "graph", "layers", "tables", "certificate", "source")


@dataclass(frozen=True)
class Content:
    """All there is to show; without a report, ``optimize`` came to an early end.

    Attributes:
        model: class name.
        graphs: after every pass.
        before, after: roles by node name in the recognised and in the last graph.
        report: with sources.
        statistics: of calibration; empty where it saw nothing.
        error: what ended it.
    """

    model: str
    graphs: Sequence[GraphView]
    before: Mapping[str, Role] = field(default_factory=dict)
    after: Mapping[str, Role] = field(default_factory=dict)
    report: Report | None = None
    statistics: Sequence[PartStatistics] = ()
    error: str = ""


def page(content: Content) -> str:
    """The HTML text."""
    values: dict[str, Any] = {
        "title": content.model,
        "error": content.error,
        "report": content.report,
        "css": Markup(asset("page.css") + asset("graph.css") + style()),
        "js": Markup(asset("page.js")),
        "passes": _passes(content.graphs),
        "groups": [],
        "contents": [("passes", "Passes")],
    }
    if content.report is not None:
        values |= _graphs(content) | _report(content.report)
        values |= figures.drawn(content.statistics, content.report)
        values["contents"] = [(name, name.capitalize()) for name in SECTIONS]
    return render("page.html.j2", **values)


def _passes(graphs: Sequence[GraphView]) -> list[dict[str, Any]]:
    rows = []
    for number, graph in enumerate(graphs):
        lines = changes(graphs[number - 1], graph) if number else []
        removed, added = count_changes(lines)
        shown = [(_kind(line), line) for line in lines] or [("", "the same graph")]
        if not number:
            shown = [("comment" if "#" in x[:3] else "", x) for x in graph_lines(graph)]
        rows.append({
            "stage": graph.stage, "count": len(graph.nodes), "removed": removed, "added": added,
            "meaning": STAGES.get(graph.stage, ""), "lines": shown,
        })  # fmt: skip
    return rows


def _kind(line: str) -> str:
    return {"-": "minus", "+": "plus", "@": "hunk"}.get(line[:1], "")


def _graphs(content: Content) -> dict[str, Any]:
    first = next(g for g in reversed(content.graphs) if g.stage == "recognised")
    last = content.graphs[-1]
    found: list[Pair] = pairs(first, content.before, last, content.after)
    present = {role.kind for role in (*content.before.values(), *content.after.values())}
    sides = (("before", first, content.before), ("after", last, content.after))
    listings = [
        (side, [(f"{side}-{n.name}", _role_class(n.name, roles), node_line(n)) for n in g.nodes])
        for side, g, roles in sides
    ]
    return {
        "groups": found,
        "legend": [(kind, text) for kind, text in MEANING.items() if kind in present],
        "listings": listings,
    }


def _role_class(name: str, roles: Mapping[str, Role]) -> str:
    return f"role-{roles[name].kind}" if name in roles else ""


def _report(report: Report) -> dict[str, Any]:
    reference = sum(layer.reference_bytes for layer in report.layers)
    refused = f", {len(report.refused)} with keys behind RoPE" if report.refused else ""
    certificate = report.layers[0].certificate
    reasons = dict.fromkeys(source.reason for source in report.sources if source.reason)
    return {
        "headline": headline(report),
        "numbers": [
            (f"{report.effective_bits:.3f}", "bits an element, everything counted"),
            (f"{report.compression:.2f}x", f"smaller than {report.dtype}"),
            (f"{report.bytes_per_token:,.0f} B", f"a token; {reference:,} B before"),
            (f"{report.worst_error:.0e}", "worst error with lossless pages"),
            (str(len(report.layers)), f"attention layers rewritten{refused}"),
        ],
        "columns": COLUMNS,
        "rows": [cells(group) for group in groups(report.layers)],
        "details": details(report.layers),
        "facts": facts(report),
        "versions": ", ".join(
            f"{name} {certificate[name]}" for name in _VERSIONS if name in certificate
        ),
        "kernels": _kernels(report),
        "why_no_kernels": "; ".join(reasons) or "no kernel is generated for these layers",
    }


def _kernels(report: Report) -> list[dict[str, Any]]:
    """Every different kernel once."""
    users: dict[tuple[str, str], list[int]] = {}
    for source in report.sources:
        for name, text in source.kernels.items():
            users.setdefault((name, text), []).append(source.index)
    layers = {layer.index: layer for layer in report.layers}
    return [
        {"name": name, "layers": indices([layers[i] for i in found]),
         "count": text.count("\n"), "html": highlighted(text)}
        for (name, text), found in users.items()
    ]  # fmt: skip
