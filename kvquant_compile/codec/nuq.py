"""Codes of a non-uniform table: nearest level and lookup, vectorised over kv heads.

Tables hold integers, so midpoints between levels are multiples of one half: above 4 bits a code
is read off ``floor(2 x)``, below that counting the midpoints passed is faster. No tensor has a
level dimension. A tie goes to the upper level; NaN gets code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNTED_LEVELS = 16
_HALF_STEPS = 256


def nearest_codes(x: Tensor, table: Tensor) -> Tensor:
    """Codes of the nearest table levels.

    Args:
        x: float32 [B, H, N, D], in table units.
        table: int8 [H, L], ascending.

    Returns:
        uint8 [B, H, N, D].
    """
    return _by_counting(x, table) if table.shape[1] <= COUNTED_LEVELS else _by_cell(x, table)


def levels_of(codes: Tensor, table: Tensor) -> Tensor:
    """Table levels of codes: uint8 [B, H, N, D], int8 [H, L] -> float32 [B, H, N, D]."""
    batch, heads, tokens, dim = codes.shape
    levels = table.float().expand(batch, heads, -1).reshape(batch, heads, -1)
    flat = codes.reshape(batch, heads, tokens * dim).long()
    return torch.gather(levels, 2, flat).view(codes.shape)


def _by_counting(x: Tensor, table: Tensor) -> Tensor:
    """Count the midpoints at or below ``x``."""
    levels = table.float()
    midpoints = (levels[:, 1:] + levels[:, :-1]) / 2
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for i in range(midpoints.shape[1]):
        codes += x >= midpoints[:, i].view(-1, 1, 1)
    return codes


def _by_cell(x: Tensor, table: Tensor) -> Tensor:
    """Look the cell ``floor(2 x)`` up: no midpoint lies inside a cell."""
    heads = table.shape[0]
    cell = torch.nan_to_num((x * 2).floor_(), nan=-_HALF_STEPS)
    cell = cell.clamp_(-_HALF_STEPS, _HALF_STEPS - 1).to(torch.int32).add_(_HALF_STEPS)
    first = torch.arange(heads, dtype=torch.int32, device=x.device) * (2 * _HALF_STEPS)
    return cell_codes(table).view(-1)[cell.add_(first.view(-1, 1, 1)).long()]


def cell_codes(table: Tensor) -> Tensor:
    """Codes of the cells ``floor(2 x)`` = -256 .. 255: int8 [H, L] -> uint8 [H, 512]."""
    levels = table.float()
    midpoints = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    edges = torch.arange(-_HALF_STEPS, _HALF_STEPS, device=table.device).float() / 2
    edges = edges.expand(table.shape[0], -1).contiguous()
    return torch.searchsorted(midpoints, edges, right=True).to(torch.uint8)
