"""Vector codebooks: k-means to start from, then exponential moving averages (arXiv 1711.00937)."""

from __future__ import annotations

import torch
from torch import Tensor

DECAY = 0.99
SMOOTHING = 1e-5
START_VECTORS = 32_768
START_STEPS = 4
BATCH = 4096
_ROWS = 256  # their distances to 2048 entries stay in a core's cache
_DEVICE_ROWS = 1 << 14  # and these keep a GPU busy, in 268 MB
_FIXED_ONE = 2.0**40  # a GPU adds in any order: in whole numbers, so that it does not matter


def nearest_entries(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Indices int32 [...] of the nearest entries [C, d] to vectors [..., d]; NaN gets one too.

    On a GPU in float64: the rounding of its products depends on how many rows they have, and a
    token must get the same code however tokens come.
    """
    flat, rows = vectors.flatten(0, -2), _ROWS
    if flat.device.type != "cpu":
        flat, codebook, rows = flat.double(), codebook.double(), _DEVICE_ROWS
    half_norm = codebook.square().sum(1) / 2
    transposed = codebook.T
    parts = [
        _first_least(torch.addmm(half_norm, part, transposed, alpha=-1))
        for part in flat.split(rows)
    ]
    return torch.cat(parts).view(vectors.shape[:-1]).to(torch.int32)


def _first_least(x: Tensor) -> Tensor:
    """The first column [N] with a row's least value; torch promises any, and a GPU gives any."""
    if x.device.type == "cpu":
        return x.argmin(1)
    columns = torch.arange(x.shape[1], device=x.device)
    least = x == x.amin(1, keepdim=True)
    return torch.where(least, columns, x.shape[1] - 1).amin(1)


def fit_codebook(vectors: Tensor, entries: int, steps: int, generator: torch.Generator) -> Tensor:
    """A codebook float32 [entries, d] for vectors [N, d]."""
    order = torch.randperm(vectors.shape[0], generator=generator)[:START_VECTORS]
    start = vectors[order.to(vectors.device)]
    repeats = -(-entries // start.shape[0])
    codebook = start.repeat(repeats, 1)[:entries].clone()
    for _ in range(START_STEPS):
        count, total = _sums(start, codebook)
        codebook = torch.where(count[:, None] > 0, total / count[:, None].clamp_min(1), codebook)
    mass, moment = _sums(start, codebook)
    for _ in range(steps):
        pick = torch.randint(vectors.shape[0], (BATCH,), generator=generator)
        count, total = _sums(vectors[pick.to(vectors.device)], codebook)
        mass = DECAY * mass + (1 - DECAY) * count
        moment = DECAY * moment + (1 - DECAY) * total
        smooth = (mass + SMOOTHING) / (mass.sum() + entries * SMOOTHING) * mass.sum()
        codebook = torch.where(mass[:, None] > SMOOTHING, moment / smooth[:, None], codebook)
    return codebook


def _sums(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """How many vectors each entry is nearest to, and their sum."""
    index = nearest_entries(vectors, codebook).long()
    count = torch.zeros(codebook.shape[0], device=vectors.device).index_add_(
        0, index, torch.ones_like(index, dtype=torch.float32)
    )
    if vectors.device.type == "cpu":
        return count, torch.zeros_like(codebook).index_add_(0, index, vectors)
    unit = vectors.double().abs().amax().clamp_min(1e-30) / _FIXED_ONE
    fixed = (vectors.double() / unit).round().long()
    total = torch.zeros_like(codebook, dtype=torch.int64).index_add_(0, index, fixed)
    return count, (total * unit).float()
