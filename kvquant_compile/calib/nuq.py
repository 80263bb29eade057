"""Non-uniform tables: weighted 1-D k-means on histograms, batched over heads.

An exact dynamic programme on coarse cells gives the start, Lloyd steps on the fine histogram the
rest (KVQuant, arXiv 2401.18079, equations 6 and 7: weights are sensitivity times the squared
scale). A start from quantiles can end far above the optimum; this one does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COARSE_CELLS = 256
FINE_CELLS = 4096


@dataclass(frozen=True, eq=False)
class Histogram:
    """Weighted samples per cell and batch row.

    Attributes:
        weight: float64 [R, C], total weight of a cell.
        moment: float64 [R, C], total weight times sample.
        energy: float64 [R, C], total weight times squared sample.
    """

    weight: Tensor
    moment: Tensor
    energy: Tensor

    def merged(self, cells: int) -> Histogram:
        """The same mass in fewer cells, whose number divides the present one."""
        shape = (self.weight.shape[0], cells, -1)
        parts = (self.weight, self.moment, self.energy)
        return Histogram(*(t.reshape(shape).sum(-1) for t in parts))


def histogram(x: Tensor, weight: Tensor, limit: float, cells: int = FINE_CELLS) -> Histogram:
    """Histogram over [-limit, limit] of float32 samples [R, S] with weights [R, S].

    Samples outside fall into the end cells; moments are exact.
    """
    width = 2 * limit / cells
    cell = ((x + limit) / width).floor_().clamp_(0, cells - 1).long()
    empty = torch.zeros(x.shape[0], cells, dtype=torch.float64, device=x.device)
    mass, sample = weight.double(), x.double()
    parts = (mass, mass * sample, mass * sample * sample)
    return Histogram(*(empty.scatter_add(1, cell, part) for part in parts))


def optimal_levels(hist: Histogram, count: int) -> Tensor:
    """The best ``count`` levels for cells that may not be split, by dynamic programming.

    Args:
        hist: a histogram of at most a few hundred cells.
        count: levels, at most the number of cells.

    Returns:
        float64 [R, count], ascending.
    """
    cost = _segment_costs(hist)
    best = cost[:, 0, 1:]
    last = []
    for _ in range(count - 1):
        # best[j] = min over i < j of best[i] + cost of one segment of the cells i + 1 .. j
        total = best[:, :-1, None] + cost[:, 1:-1, 2:]
        value, start = total.min(1)
        best = torch.cat([torch.full_like(value[:, :1], torch.inf), value], 1)
        last.append(torch.cat([torch.zeros_like(start[:, :1]), start + 1], 1))
    return _segment_means(hist, last)


def lloyd(hist: Histogram, levels: Tensor, limit: float, steps: int = 20) -> Tensor:
    """Lloyd steps on histogram cells: levels float64 [R, L] -> the same shape, ascending.

    A level that no sample is nearest to stays where it is.
    """
    cells = hist.weight.shape[1]
    width = 2 * limit / cells
    mass, moment = _running(hist.weight), _running(hist.moment)
    for _ in range(steps):
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        edge = ((middle + limit) / width).round_().clamp_(0, cells).long()
        edge = torch.nn.functional.pad(edge, (1, 0))
        edge = torch.nn.functional.pad(edge, (0, 1), value=cells)
        got_mass = mass.gather(1, edge).diff(dim=1)
        mean = moment.gather(1, edge).diff(dim=1) / got_mass.clamp_min(1e-300)
        levels = torch.where(got_mass > 0, mean, levels).sort(1).values
    return levels


def weighted_kmeans(x: Tensor, weight: Tensor, count: int, limit: float) -> Tensor:
    """``count`` levels that minimise the weighted squared error of samples.

    Args:
        x: float32 [R, S], samples within [-limit, limit].
        weight: float32 [R, S], at least 0.
        count: levels, at most ``COARSE_CELLS``.
        limit: half width of the histogram.

    Returns:
        float64 [R, count], ascending.
    """
    hist = histogram(x, weight, limit)
    return lloyd(hist, optimal_levels(hist.merged(COARSE_CELLS), count), limit)


def _running(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def _segment_costs(hist: Histogram) -> Tensor:
    """Squared error [R, C + 1, C + 1] of one level for cells i .. j - 1; inf unless i < j."""
    mass, moment, energy = (_running(t) for t in (hist.weight, hist.moment, hist.energy))
    w = mass[:, None, :] - mass[:, :, None]
    m = moment[:, None, :] - moment[:, :, None]
    e = energy[:, None, :] - energy[:, :, None]
    cost = (e - m * m / w.clamp_min(1e-300)).clamp_min(0.0)
    size = cost.shape[1]
    proper = torch.ones(size, size, dtype=torch.bool, device=cost.device).triu(1)
    return torch.where(proper, cost, torch.inf)


def _segment_means(hist: Histogram, last: list[Tensor]) -> Tensor:
    """Walk the dynamic programme back and average every segment."""
    rows, cells = hist.weight.shape
    mass, moment = _running(hist.weight), _running(hist.moment)
    stop = torch.full((rows, 1), cells, dtype=torch.long, device=hist.weight.device)
    levels: list[Tensor] = []
    for starts in [*reversed(last), None]:
        start = torch.zeros_like(stop) if starts is None else starts.gather(1, stop - 1)
        w = mass.gather(1, stop) - mass.gather(1, start)
        m = moment.gather(1, stop) - moment.gather(1, start)
        # An empty segment has no mean: it repeats the level above it.
        levels.append(torch.where(w > 0, m / w.clamp_min(1e-300), torch.full_like(m, torch.nan)))
        stop = start
    return _fill_empty(torch.cat(levels[::-1], 1))


def _fill_empty(levels: Tensor) -> Tensor:
    """Replace NaN levels by their nearest lower (or else higher) neighbour."""
    columns = list(levels.unbind(1))
    for order in (range(1, len(columns)), range(len(columns) - 2, -1, -1)):
        step = 1 if order.step > 0 else -1
        for i in order:
            columns[i] = torch.where(columns[i].isnan(), columns[i - step], columns[i])
    return torch.nan_to_num(torch.stack(columns, 1))
