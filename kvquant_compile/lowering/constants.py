"""From a layer's plan and calibrated tables to the constants that its ops take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.algebra.recipe import Recipe, RecipeTables
from kvquant_compile.codec.formats import Format, Layout, Tables
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.order import gather_index, key_order, sorted_turns, stored_tables
from kvquant_compile.logs import logger
from kvquant_compile.plan import LayerPlan

_log = logger("lowering")


@dataclass(frozen=True, eq=False)
class LayerConstants:
    """Constants of one layer, keys in pair order (see :mod:`kvquant_compile.codec.layout`).

    Attributes:
        layout: bytes of the layer's pages.
        tables: the fields of :class:`LayerTables` in declaration order, or a recipe's constants
            (in the model's channel order); empty when lossless.
        table_names: of the tables.
        key_order, query_order: int64 [2 P], the model's channel of every stored one (the
            zero channel ``dim`` for padding) before and after the rotation.
        frequencies: float32 [P] radians per position; empty without RoPE.
        rope_scale: float32 [P] factor of cos and sin; empty without RoPE.
    """

    layout: Layout
    tables: list[Tensor]
    table_names: tuple[str, ...]
    key_order: Tensor
    query_order: Tensor
    frequencies: Tensor
    rope_scale: Tensor

    def __repr__(self) -> str:
        return f"LayerConstants({self.layout}, {len(self.tables)} tables)"

    def arguments(self) -> tuple[list[Tensor], list[Tensor]]:
        """(tables, geometry) as the ops take them."""
        geometry = [self.key_order, self.query_order, self.frequencies, self.rope_scale]
        return self.tables, geometry


def lower_layer(
    plan: LayerPlan,
    spec: Format,
    tables: Tables | None,
    dtype: torch.dtype,
    device: torch.device,
) -> LayerConstants:
    """Constants of one layer on ``device``; ``tables`` is None for lossless storage."""
    sizes = (plan.kv_heads, plan.key_dim, plan.value_dim, dtype.itemsize)
    layout = BlockLayout(spec, *sizes) if isinstance(spec, Recipe) else PageLayout(spec, *sizes)
    pairs = sorted_turns(plan.rope)
    order_of_keys = key_order(plan.rope, plan.key_dim)
    query_order = _query_order(plan, order_of_keys, [o for _, o, _ in pairs])
    width = len(order_of_keys) // 2
    frequencies, scale = torch.empty(0), torch.empty(0)
    if plan.rope is not None:
        still = width - len(pairs)
        frequencies = torch.tensor([f for _, _, f in pairs] + [0.0] * still)
        scale = torch.tensor([plan.rope.scale] * len(pairs) + [1.0] * still)
    order = gather_index(order_of_keys, plan.key_dim).to(device)
    lowered = {} if tables is None else _lowered(tables.to(device), order)
    _log.debug("layer %d: %s, %d tables", plan.index, layout, len(lowered))
    return LayerConstants(
        layout,
        list(lowered.values()),
        tuple(lowered),
        order,
        gather_index(query_order, plan.key_dim).to(device),
        frequencies.to(device),
        scale.to(device),
    )


def _query_order(
    plan: LayerPlan, key_order: list[int], out_pairs: list[tuple[int, int]]
) -> list[int]:
    """The rotated channel at every place of pair order."""
    if plan.rope is None:
        return key_order
    output = dict(plan.rope.passthrough)
    for (a, b), pair in zip((i for i, _, _ in sorted_turns(plan.rope)), out_pairs, strict=True):
        output[a], output[b] = pair
    return [output.get(channel, -1) for channel in key_order]


def _lowered(tables: Tables, order: Tensor) -> dict[str, Tensor]:
    """Tables by name, key constants in pair order (a recipe's stay as they are)."""
    if isinstance(tables, RecipeTables):
        return tables.tensors()
    moved = stored_tables(tables, order)
    return {name: t.contiguous() for name, t in moved.tensors().items()}
