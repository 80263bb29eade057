"""Pair order of a layer's keys: from its rotation to channels and constants as pages store them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvquant_compile.codec.layout import pair_order
from kvquant_compile.codec.spec import LayerTables
from kvquant_compile.plan import RopeSpec

Turn = tuple[tuple[int, int], tuple[int, int], float]


def sorted_turns(rope: RopeSpec | None) -> list[Turn]:
    """(input pair, output pair, frequency), by falling frequency (stable)."""
    if rope is None:
        return []
    rows = zip(rope.in_pairs, rope.out_pairs, rope.frequencies, strict=True)
    return sorted(rows, key=lambda row: -abs(row[2]))


def key_order(rope: RopeSpec | None, dim: int) -> list[int]:
    """The model's channel at every place of pair order, -1 for padding."""
    return pair_order([pair for pair, _, _ in sorted_turns(rope)], dim)


def gather_index(order: list[int], dim: int) -> Tensor:
    """Index int64 [2 P] for :func:`reorder`: padding reads the zero channel appended at ``dim``;
    empty when nothing moves."""
    if order == list(range(dim)):
        return torch.empty(0, dtype=torch.int64)
    return torch.tensor([dim if channel < 0 else channel for channel in order])


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """Channels [..., dim] into pair order [..., 2 P], zeros for padding."""
    if order.numel() == 0:
        return x
    if order.numel() > x.shape[-1]:
        x = torch.nn.functional.pad(x, (0, 1))
    return x[..., order]


def restored(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Inverse of :func:`reorder`: [..., 2 P] in pair order to the model's channels [..., dim]."""
    if order.numel() == 0:
        return x
    return x[..., order.argsort()[:dim]]


def stored_tables(tables: LayerTables, order: Tensor) -> LayerTables:
    """Per-channel key constants in pair order, padding with scale 1 and no weight.

    ``key_feedback`` is in pair order already: its stages are stages of stored channels.
    """
    scale = reorder(tables.key_scale, order)
    return replace(
        tables,
        key_scale=torch.where(scale == 0, torch.ones_like(scale), scale),
        key_zero=reorder(tables.key_zero, order),
        key_weight=reorder(tables.key_weight, order),
    )
