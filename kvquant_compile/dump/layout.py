"""Places for the boxes of a small graph: layers from top to bottom, few crossings, short edges.

The classical scheme (Sugiyama, Tagawa and Toda 1981): rows by longest path, bends where an edge
passes a row, order within a row by the mean place of neighbours, then places that minimise the
squared length of edges at a least distance (pool adjacent violators).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

SWEEPS = 12
Point = tuple[float, float]


@dataclass(frozen=True)
class Placed:
    """Where things are; x grows to the right, y downwards, in the units of the sizes given.

    Attributes:
        centres: node -> centre of its box.
        edges: (from, to) -> points from the lower side of one box to the upper side of the other.
        width, height: of the whole.
    """

    centres: dict[str, Point]
    edges: dict[tuple[str, str], list[Point]]
    width: float
    height: float


def place(
    inputs: Mapping[str, Sequence[str]],
    widths: Mapping[str, float],
    height: float,
    gap: Point,
    hints: Mapping[str, float] | None = None,
) -> Placed:
    """Place a graph.

    Args:
        inputs: node -> nodes it reads, inputs before readers.
        widths: of every box; all are ``height`` high.
        height: of a box.
        gap: least distance between boxes of a row, and between rows.
        hints: where some nodes are in a picture beside this one; their order is kept.
    """
    rows = _rows(inputs)
    chains = {(a, b): _chain(a, b, rows) for b, sources in inputs.items() for a in sources}
    links = [pair for chain in chains.values() for pair in pairwise(chain)]
    ordered = _ordered(rows, chains, links, hints or {})
    size = {name: widths.get(name, 2.0) for row in ordered for name in row}
    x = _places(ordered, links, size, gap[0])
    left = min(x[n] - size[n] / 2 for n in x)
    right = max(x[n] + size[n] / 2 for n in x)
    pitch = height + gap[1]
    points = {
        name: (x[name] - left, row * pitch + height / 2)
        for row, names in enumerate(ordered)
        for name in names
    }
    edges = {
        (a, b): [
            (points[a][0], points[a][1] + height / 2),
            *(points[bend] for bend in chain[1:-1]),
            (points[b][0], points[b][1] - height / 2),
        ]
        for (a, b), chain in chains.items()
    }
    centres = {name: points[name] for name in inputs}
    return Placed(centres, edges, right - left, len(ordered) * pitch - gap[1])


def _rows(inputs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Longest path from a source; sources as low as their readers allow."""
    rows: dict[str, int] = {}
    for name, sources in inputs.items():
        rows[name] = max((rows[s] + 1 for s in sources), default=0)
    readers: dict[str, list[str]] = {}
    for name, sources in inputs.items():
        for source in sources:
            readers.setdefault(source, []).append(name)
    for name in reversed(list(inputs)):
        if not inputs[name] and name in readers:
            rows[name] = max(0, min(rows[r] for r in readers[name]) - 1)
    return rows


def _chain(a: str, b: str, rows: Mapping[str, int]) -> list[str]:
    bends = [f"{a}\n{b}\n{row}" for row in range(rows[a] + 1, rows[b])]
    return [a, *bends, b]


def _ordered(
    rows: Mapping[str, int],
    chains: Mapping[tuple[str, str], Sequence[str]],
    links: Sequence[tuple[str, str]],
    hints: Mapping[str, float],
) -> list[list[str]]:
    """Rows, each in an order with few crossings."""
    ordered: list[list[str]] = [[] for _ in range(max(rows.values()) + 1)]
    for name, row in rows.items():
        ordered[row].append(name)
    for (a, _), chain in chains.items():
        for step, bend in enumerate(chain[1:-1]):
            ordered[rows[a] + 1 + step].append(bend)
    above, below = _neighbours(links)
    known = dict(hints)
    for names in ordered:
        for name in names:
            if name not in known:
                known[name] = _mean([known[m] for m in above.get(name, ()) if m in known], 0.0)
        names.sort(key=known.__getitem__)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for names in ordered if down else reversed(ordered):
            places = {n: i / max(1, len(r) - 1) for r in ordered for i, n in enumerate(r)}
            near = above if down else below
            wanted = {n: _mean([places[m] for m in near.get(n, ())], places[n]) for n in names}
            names.sort(key=wanted.__getitem__)
    return ordered


def _neighbours(
    links: Sequence[tuple[str, str]],
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for a, b in links:
        above.setdefault(b, []).append(a)
        below.setdefault(a, []).append(b)
    return above, below


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _places(
    ordered: Sequence[Sequence[str]],
    links: Sequence[tuple[str, str]],
    size: Mapping[str, float],
    gap: float,
) -> dict[str, float]:
    x: dict[str, float] = {}
    for row in ordered:
        at = 0.0
        for name in row:
            x[name] = at + size[name] / 2
            at += size[name] + gap
        for name in row:
            x[name] -= at / 2
    above, below = _neighbours(links)
    for sweep in range(2 * SWEEPS):
        for row in ordered if sweep % 2 == 0 else reversed(ordered):
            wanted = [
                _mean([x[m] for m in (*above.get(n, ()), *below.get(n, ()))], x[n]) for n in row
            ]
            x |= dict(zip(row, _apart(wanted, [size[n] for n in row], gap), strict=True))
    return x


def _apart(wanted: Sequence[float], sizes: Sequence[float], gap: float) -> list[float]:
    """The places nearest to those wanted, in the same order, without overlap."""
    offsets = [0.0]
    for a, b in pairwise(sizes):
        offsets.append(offsets[-1] + (a + b) / 2 + gap)
    pools: list[list[float]] = []
    for want, offset in zip(wanted, offsets, strict=True):
        pools.append([want - offset, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    flat = [value for value, count in pools for _ in range(int(count))]
    return [value + offset for value, offset in zip(flat, offsets, strict=True)]
