"""Pages to float32 keys and values, by the definition in :mod:`kvquant_compile.codec.spec`.

On a CPU up to 4 bits codes go straight to levels (:mod:`kvquant_compile.codec.levels`); elsewhere
through the codec's own unpacking. Both give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.codec.keys import dequantise_keys
from kvquant_compile.codec.layout import PageLayout, unpack_keys, unpack_slots, unpack_values
from kvquant_compile.codec.levels import key_levels, value_levels
from kvquant_compile.codec.spec import PAGE_TOKENS, LayerTables
from kvquant_compile.codec.values import dequantise_values

_DIRECT_BITS = 4


def read_keys(layout: PageLayout, pages: Tensor, tables: LayerTables) -> Tensor:
    """Keys before RoPE in pair order, float32 [B, H, 64 n, 2 P], of uint8 [B, H, n, bytes]."""
    spec = layout.spec
    if spec.key_bits > _DIRECT_BITS or pages.device.type != "cpu":
        return dequantise_keys(unpack_keys(layout, pages), tables, spec)
    keys = key_levels(layout.split(pages, "key_codes"), tables.key_table, spec.key_bits)
    if spec.key_token_scale:
        scale = layout.split(pages, "key_token_scale").contiguous().view(torch.float16)
        keys.mul_(scale.float().flatten(2)[..., None])
    keys.add_(tables.key_zero[:, None]).mul_(tables.key_scale[:, None])
    index, residual = unpack_slots(layout, pages, "key")
    return keys.scatter_add_(-1, index.long(), residual.float())


def read_values(layout: PageLayout, pages: Tensor, tables: LayerTables) -> Tensor:
    """Values, float32 [B, H, 64 n, D], of pages uint8 [B, H, n, bytes]."""
    spec, dim = layout.spec, layout.value_dim
    if spec.value_bits > _DIRECT_BITS or pages.device.type != "cpu":
        return dequantise_values(unpack_values(layout, pages), tables, spec)
    words = layout.split(pages, "value_codes")
    values = value_levels(words, tables.value_table, spec.value_bits)  # [B, H, n, D, 64]
    both = layout.split(pages, "value_scale_zero").contiguous().view(torch.float16).float()
    scale, zero = both.unflatten(-1, (PAGE_TOKENS, 2)).unsqueeze(3).unbind(-1)
    values = values.mul_(scale).add_(zero).transpose(-1, -2)[..., :dim].flatten(2, 3)
    index, residual = unpack_slots(layout, pages, "value")
    values.scatter_add_(-1, index.long(), residual.float())
    return values.mul_(tables.value_gain[:, None]).add_(tables.value_offset[:, None])
