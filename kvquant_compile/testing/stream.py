"""A recipe driven as a model drives it: one cache layer, tokens in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.algebra import Recipe, Sample
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering import ops
from kvquant_compile.lowering.attend import CacheView, read_block
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.plan import AttendPlan, LayerPlan
from kvquant_compile.runtime.cache import QuantizedCache


@dataclass(frozen=True, eq=False)
class Stored:
    """What a cache holds in the end: keys and values as they are read, and the exact rows."""

    keys: Tensor
    values: Tensor
    exact: Tensor
    effective_bits: float

    names = ("keys", "values", "exact tokens")

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of ``names``."""
        return self.keys, self.values, self.exact


def streamed(
    recipe: Recipe, x: Tensor, pieces: Sequence[int], calibration: Tensor | None = None
) -> Stored:
    """Append tokens [B, H, N, D], as keys and as values, in pieces, and read them all.

    Constants are fitted to ``calibration``, or to ``x``; there is no rotation.
    """
    heads, dim = x.shape[1], x.shape[3]
    plan = LayerPlan(0, heads, dim, dim, None, (AttendPlan(heads, 1.0),))
    data = torch.nan_to_num(x if calibration is None else calibration, 0.0, 0.0, 0.0)
    sample = Sample(data.float().transpose(0, 1).flatten(1, 2))
    tables = recipe.fit(sample, sample)
    constants = lower_layer(plan, recipe, tables, x.dtype, x.device)
    cache, at = QuantizedCache([constants.layout], x.dtype, x.device), 0
    arguments, text = constants.arguments(), str(constants.layout)
    for piece in pieces:
        positions = torch.arange(at, at + piece, device=x.device).expand(x.shape[0], -1)
        step, part = cache.begin(positions, None), x[:, :, at : at + piece]
        layer = cache.pages[0]
        ops.append(part, part, step.slots, cache.table, layer.slabs, layer.sinks, *arguments, text)
        cache.commit(step)
        at += piece
    layer = cache.pages[0]
    view = CacheView(cache.table, cache.positions, layer.slabs, layer.sinks, *arguments, text)
    pages = -(-at // PAGE_TOKENS)
    keys, values = read_block(view, 0, pages, cache.lengths, x.dtype)
    keys, values = keys[:, :, :at, :dim], values[:, :, :at]
    return Stored(keys, values, layer.sinks.clone(), cache.effective_bits())
