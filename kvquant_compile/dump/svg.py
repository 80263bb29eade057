"""Boxes as SVG: colours are classes, so that a page, or the style of a file, decides them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup

from kvquant_compile.dump.blocks import Box
from kvquant_compile.dump.layout import Placed, Point, place
from kvquant_compile.dump.text import node_line
from kvquant_compile.inspect.templates import asset

HEIGHT, GAP, MARGIN, HEADING = 40.0, (18.0, 26.0), 12.0, 30.0
_TITLE, _SUBTITLE, _PADDING = 7.4, 5.9, 22.0  # width of a character of each, and of both sides
_MOST_LINES = 12  # of a tooltip


def arranged(boxes: Sequence[Box], beside: Placed | None = None) -> Placed:
    """Places for boxes; those that a picture ``beside`` shows as well keep its order."""
    widths = {box.key: _width(box) for box in boxes}
    hints = {} if beside is None else {k: x for k, (x, _) in beside.centres.items() if k in widths}
    return place({box.key: box.inputs for box in boxes}, widths, HEIGHT, GAP, hints)


def drawing(boxes: Sequence[Box], placed: Placed, name: str, *, link: str = "") -> Markup:
    """One picture, in the colours of the page that it is put into.

    Args:
        boxes: inputs first.
        placed: where they are.
        name: of the picture, for those who do not see it.
        link: every box links to ``#link`` and the name of its first node; empty for none.
    """
    width, height = placed.width + 2 * MARGIN, placed.height + 2 * MARGIN
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" aria-label="{}" '
        'viewBox="{} {} {} {}" width="{}" height="{}">'
    ).format(name, -MARGIN, -MARGIN, *(f"{x:.0f}" for x in (width, height, width, height)))
    return Markup("\n").join([head, *_parts(boxes, placed, link), Markup("</svg>")])


def stacked(name: str, pictures: Sequence[tuple[str, Sequence[Box]]]) -> Markup:
    """Titled pictures, one under the other, as a file with its own colours."""
    shown = [(title, boxes, arranged(boxes)) for title, boxes in pictures]
    width = max((placed.width for _, _, placed in shown), default=0.0) + 2 * MARGIN
    at, groups = MARGIN, []
    for title, boxes, placed in shown:
        left = (width - placed.width) / 2
        heading = Markup('<text class="heading" x="{:.0f}" y="{:.0f}">{}</text>')
        shift = Markup('<g transform="translate({:.1f} {:.1f})">').format(left, at + HEADING)
        groups += [heading.format(MARGIN, at + 14, title), shift]
        groups += [*_parts(boxes, placed, ""), Markup("</g>")]
        at += placed.height + HEADING + 3 * MARGIN
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" aria-label="{}" '
        'viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" height="{:.0f}">\n<style>'
    ).format(name, width, at, width, at)
    css = Markup("svg { color-scheme: light dark; }\n" + asset("graph.css") + "</style>")
    return Markup("\n").join([head + css, *groups, Markup("</svg>\n")])


def _parts(boxes: Sequence[Box], placed: Placed, link: str) -> list[Markup]:
    """Edges, and boxes over them."""
    roles = {box.key: box.role for box in boxes}
    parts = []
    for (a, b), points in placed.edges.items():
        role = roles[a]
        kind = f" role-{role.kind}" if role is not None else ""
        parts.append(Markup('<path class="edge{}" data-from="{}" data-to="{}" d="{}"/>').format(
            kind, a, b, _curve(points)))  # fmt: skip
    for box in boxes:
        drawn = _box(box, placed, _width(box))
        anchor = Markup('<a href="#{}{}">{}</a>')
        parts.append(anchor.format(link, box.members[0].name, drawn) if link else drawn)
    return parts


def _width(box: Box) -> float:
    return max(_TITLE * len(box.title), _SUBTITLE * len(box.subtitle)) + _PADDING


def _box(box: Box, placed: Placed, width: float) -> Markup:
    x, y = placed.centres[box.key]
    classes = ["node", f"role-{box.role.kind}" if box.role else "plain"]
    classes += ["outside"] if box.outside else []
    names = " ".join(dict.fromkeys(n for m in box.members for n in (m.name, m.replaces) if n))
    middle = y + (4 if not box.subtitle else -3)
    lines = [
        Markup('<g class="{}" data-key="{}" data-names="{}">').format(
            " ".join(classes), box.key, names),
        Markup("<title>{}</title>").format(_tooltip(box)),
        Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.0f}" rx="8"/>').format(
            x - width / 2, y - HEIGHT / 2, width, HEIGHT),
        Markup('<text class="title" x="{:.1f}" y="{:.1f}">{}</text>').format(x, middle, box.title),
    ]  # fmt: skip
    if box.subtitle:
        lines.append(Markup('<text class="subtitle" x="{:.1f}" y="{:.1f}">{}</text>').format(
            x, y + 12, box.subtitle))  # fmt: skip
    return Markup("").join([*lines, Markup("</g>")])


def _tooltip(box: Box) -> str:
    lines = [node_line(member) for member in box.members]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], f"and {len(lines) - _MOST_LINES + 1} more"]
    sources = dict.fromkeys(str(m.source) for m in box.members if m.source is not None)
    return "\n".join([*lines, *list(sources)[:3]])


def _curve(points: Sequence[Point]) -> str:
    """A smooth line that leaves and arrives vertically (cubic Hermite segments)."""
    ends = len(points) - 1
    slopes: list[Point] = []
    for i, (_, y) in enumerate(points):
        before, after = points[max(0, i - 1)], points[min(ends, i + 1)]
        if i in (0, ends):
            slopes.append((0.0, abs(after[1] - before[1]) or y))
        else:
            slopes.append(((after[0] - before[0]) / 2, (after[1] - before[1]) / 2))
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for (a, b), (s, t) in zip(pairwise(points), pairwise(slopes), strict=True):
        parts.append(
            f"C{a[0] + s[0] / 3:.1f} {a[1] + s[1] / 3:.1f} "
            f"{b[0] - t[0] / 3:.1f} {b[1] - t[1] / 3:.1f} {b[0]:.1f} {b[1]:.1f}"
        )
    return "".join(parts)
