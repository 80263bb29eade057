"""What a stored format gives back, without pages: the round trip of its keys or its values.

Exact tokens (sinks, a recipe's last ones, an incomplete unit) stay as they are, so that the result
is what the paged program reads when a whole sequence is in its cache. The exact last tokens of
``recent_window=`` are other ones for every query: they come back as their pages hold them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvquant_compile.codec.algebra import Recipe, Tail
from kvquant_compile.codec.algebra.recipe import RecipeTables
from kvquant_compile.codec.formats import Format, Tables
from kvquant_compile.codec.keys import dequantise_keys, quantise_keys
from kvquant_compile.codec.order import gather_index, key_order, reorder, restored, stored_tables
from kvquant_compile.codec.spec import CodecSpec, LayerTables
from kvquant_compile.codec.values import dequantise_values, quantise_values
from kvquant_compile.plan import LayerPlan

KEYS, VALUES = "keys", "values"
PARTS = (KEYS, VALUES)
Trip = Callable[[Tensor], Tensor]


def round_trip(plan: LayerPlan, spec: Format, tables: Tables, part: str, tail: bool = True) -> Trip:
    """[B, H, S, D], the model's channels -> float32 of the same shape, as read back.

    Args:
        plan: of the layer: error feedback follows the order in which its keys are stored.
        spec: the layer's format; not lossless.
        tables: its constants.
        part: "keys" (as the format stores them, before or after RoPE) or "values".
        tail: whether a recipe's last tokens stay exact; without, short texts show what its codes
            do as well.
    """
    if isinstance(spec, Recipe):
        assert isinstance(tables, RecipeTables)
        return _blocks(spec, tables, part, tail)
    assert isinstance(tables, LayerTables)
    return _ours(plan, spec, tables, part)


def _ours(plan: LayerPlan, spec: CodecSpec, tables: LayerTables, part: str) -> Trip:
    order = gather_index(key_order(plan.rope, plan.key_dim), plan.key_dim)

    def trip(x: Tensor) -> Tensor:
        x = x.float()
        if part == KEYS:
            mine = order.to(x.device)
            stored = stored_tables(tables, mine)
            paired = dequantise_keys(quantise_keys(reorder(x, mine), stored, spec), stored, spec)
            read = restored(paired, mine, plan.key_dim)
        else:
            read = dequantise_values(quantise_values(x, tables, spec), tables, spec)
        return torch.cat([x[:, :, : spec.sink_tokens], read[:, :, spec.sink_tokens :]], 2)

    return trip


def _blocks(recipe: Recipe, tables: RecipeTables, part: str, exact: bool) -> Trip:
    index = PARTS.index(part)
    _, codec, tail = recipe.kinds()[index]
    tail = tail if exact else Tail()
    constants = recipe.constants(tables.constants)[index]

    def trip(x: Tensor) -> Tensor:
        x = x.float()
        packed = int(tail.packed(codec.tokens, torch.tensor(x.shape[2])))
        units = x[:, :, :packed].unflatten(2, (-1, codec.tokens))
        read = codec.decode(codec.encode(units, constants), constants).flatten(2, 3)
        first = min(recipe.sinks, packed)
        return torch.cat([x[:, :, :first], read[:, :, first:], x[:, :, packed:]], 2)

    return trip
