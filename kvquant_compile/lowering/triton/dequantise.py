"""A block of pages as plain keys and values, for attention of many queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import next_power_of_2

from kvquant_compile.codec.layout import padded
from kvquant_compile.codec.spec import LayerTables
from kvquant_compile.lowering.attend import CacheView
from kvquant_compile.lowering.triton.compat import launch_options, native
from kvquant_compile.lowering.triton.dequantise_kernels import key_kernel, value_kernel
from kvquant_compile.lowering.triton.emit import CodeWords
from kvquant_compile.lowering.triton.prepared import page_addresses, prepared

TOKENS = 32


@dataclass(frozen=True, eq=False)
class Workspace:
    """Room for a block of ``block`` tokens, a multiple of 64.

    Attributes:
        keys: [B, H, block, key_dim], rotated, in the model's channel order.
        values: [B, H, block, value_dim].
        places: int32 [B, block], slot of every token; -1 where nobody sees one.
    """

    keys: Tensor
    values: Tensor
    places: Tensor

    @staticmethod
    def empty(cache: CacheView, block: int, like: Tensor) -> Workspace:
        """Uninitialised, in the dtype and on the device of ``like``."""
        layout, batch = cache.layout, cache.table.shape[0]
        return Workspace(
            like.new_empty(batch, layout.heads, block, layout.key_dim),
            like.new_empty(batch, layout.heads, block, layout.value_dim),
            like.new_empty(batch, block, dtype=torch.int32),
        )


def dequantise(
    cache: CacheView, limit: Tensor, first: int, into: Workspace, program: int = TOKENS
) -> None:
    """Fill a workspace with the slots ``first ..`` of every row: two launches, every page read
    once.

    Args:
        cache: one layer's cache.
        limit: int32 [B], slots that hold a token are below. Pages that begin at or above it are
            left out; what a page has after its last token is finite but means nothing.
        first: a multiple of 64.
        into: receives keys, values and places.
        program: tokens of a program, a power of two from 8 to 64.
    """
    _keys(cache, limit, first, into, program)
    _values(cache, limit, first, into, program)


def _grid(space: Workspace, program: int) -> tuple[int, int]:
    batch, heads, block, _ = space.keys.shape
    return block // program, batch * heads


def _keys(cache: CacheView, limit: Tensor, first: int, into: Workspace, program: int) -> None:
    layout, tables = cache.layout, LayerTables(*cache.tables)
    spec, at = layout.spec, {name: span[0] for name, span in layout.offsets.items()}
    constants = prepared(layout, cache.tables, cache.geometry)
    pairs = padded(layout.key_dim) // 2
    words = CodeWords("k", at["key_codes"], spec.key_bits, pairs // 4)
    key_kernel[_grid(into, program)](
        into.keys, into.places, limit, cache.positions, cache.table, page_addresses(cache.pages),
        tables.key_table, tables.key_scale, tables.key_zero, constants.turns,
        constants.rope_scale, constants.query_order, cache.sinks,
        layout.heads, first, into.keys.shape[2], cache.table.stride(0),
        cache.positions.stride(0), layout.page_bytes,
        DIM=layout.key_dim, VALUE_DIM=layout.value_dim, PAIRS=pairs,
        PAIRS_POW2=next_power_of_2(pairs), BITS=spec.key_bits, PER_LANE=words.per_lane,
        WIDTH=words.width, APART=words.sections == 2, SLOTS=spec.key_slots,
        TOKEN_SCALE=spec.key_token_scale, CODES=at["key_codes"], INDEX=at["key_slot_index"],
        RESIDUAL=at["key_slot_residual"], SCALE=at["key_token_scale"],
        SINKS=spec.sink_tokens, RING=layout.ring, ORDER=constants.query_order.numel() > 0,
        ROPE=constants.rotated > 0, NATIVE=native(), TOKENS=program,
        **launch_options(num_warps=4),
    )  # fmt: skip


def _values(cache: CacheView, limit: Tensor, first: int, into: Workspace, program: int) -> None:
    layout, tables = cache.layout, LayerTables(*cache.tables)
    spec, at = layout.spec, {name: span[0] for name, span in layout.offsets.items()}
    channels = padded(layout.value_dim)
    words = CodeWords("v", at["value_codes"], spec.value_bits, channels // 8)
    value_kernel[_grid(into, program)](
        into.values, limit, cache.table, page_addresses(cache.pages), tables.value_table,
        tables.value_gain, tables.value_offset, cache.sinks,
        layout.heads, first, into.values.shape[2], cache.table.stride(0), layout.page_bytes,
        DIM=layout.value_dim, DIM_POW2=next_power_of_2(layout.value_dim),
        KEY_WIDTH=padded(layout.key_dim), CHANNELS=channels, BITS=spec.value_bits,
        PER_LANE=words.per_lane, WIDTH=words.width, APART=words.sections == 2,
        SLOTS=spec.value_slots, CODES=at["value_codes"], INDEX=at["value_slot_index"],
        RESIDUAL=at["value_slot_residual"], SCALE=at["value_scale_zero"],
        SINKS=spec.sink_tokens, RING=layout.ring, TOKENS=program, **launch_options(num_warps=4),
    )  # fmt: skip
