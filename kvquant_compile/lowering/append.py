"""``kvquant::append`` in plain torch: quantise the step's tokens once and set their bits.

A page is read, changed and written as a whole; the bytes of its other tokens come out as they
went in, because packing is a bijection on codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.formats import parse_layout
from kvquant_compile.codec.keys import KeyCodes, quantise_keys
from kvquant_compile.codec.layout import (
    PageLayout,
    pack_quantised,
    pack_raw,
    unpack_keys,
    unpack_raw,
    unpack_values,
)
from kvquant_compile.codec.order import reorder
from kvquant_compile.codec.spec import PAGE_TOKENS, LayerTables
from kvquant_compile.codec.values import ValueCodes, quantise_values
from kvquant_compile.lowering import blocks
from kvquant_compile.lowering.pages import gather_pages, write_pages
from kvquant_compile.lowering.recent import keep_exact


@dataclass(frozen=True, eq=False)
class RawCodes:
    """Lossless tokens: keys in pair order and values, [B, H, N, D]."""

    keys: Tensor
    values: Tensor


# Coding takes about twenty float32 temporaries; chunks keep them small, and in the caches.
CHUNK_TOKENS = 1024

Codes = tuple[KeyCodes, ValueCodes] | tuple[RawCodes]


@dataclass(frozen=True)
class Span:
    """Where the step's tokens go.

    Attributes:
        first: int64 [B], first page touched in every sequence.
        pages: pages touched by the sequence that touches most.
        local: int64 [B, S], token's place counted from its sequence's first page.
        used: bool [B, pages], pages that exist for the sequence.
        dense: the common start of all tokens in local places when none is padding, else -1.
        begun: whether a first page already holds tokens.
    """

    first: Tensor
    pages: int
    local: Tensor
    used: Tensor
    dense: int
    begun: bool


def append(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    table: Tensor,
    pages: list[Tensor],
    sinks: Tensor,
    tables: list[Tensor],
    geometry: list[Tensor],
    format: str,
) -> None:
    """Store a step's tokens; argument shapes as in :mod:`kvquant_compile.lowering.ops`.

    Args:
        key: [B, H, S, key_dim] before RoPE, any float dtype.
        value: [B, H, S, value_dim].
    """
    layout = parse_layout(format)
    for start in range(0, slots.shape[1], CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        if isinstance(layout, BlockLayout):
            step = (key[:, :, part], value[:, :, part], slots[:, part])
            blocks.append(layout, *step, table, pages, sinks, tables)
            continue
        ordered = reorder(key[:, :, part], geometry[0])
        _append_chunk(
            layout, ordered, value[:, :, part], slots[:, part], table, pages, sinks, tables
        )


def _append_chunk(
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    table: Tensor,
    pages: list[Tensor],
    sinks: Tensor,
    tables: list[Tensor],
) -> None:
    """Store some consecutive tokens of the step, keys in pair order."""
    if not bool((slots >= 0).any()):
        return
    span = _span(slots)
    new = _encode(layout, key, value, tables)
    ids = table.gather(1, _page_columns(span, table.shape[1])).long()
    old = _decode(layout, gather_pages(pages, ids), key.dtype) if span.begun else None
    before: Sequence[Any] = old or [None] * len(new)
    merged = [_merge(o, n, span) for o, n in zip(before, new, strict=True)]
    packed = _pack(layout, merged)
    write_pages(pages, ids[span.used], packed.transpose(1, 2)[span.used])
    tokens = torch.cat([key, value.to(key.dtype)], -1)
    keep_exact(sinks, tokens, slots, layout.sink_tokens, layout.ring)


def _span(slots: Tensor) -> Span:
    valid = slots >= 0
    last = slots.amax(1).long()
    start = torch.where(valid, slots, slots.new_full((), 2**30)).amin(1).long()
    start = torch.minimum(start, last.clamp(min=0))
    first = start // PAGE_TOKENS
    count = torch.where(last < 0, 0, last // PAGE_TOKENS - first + 1)
    pages = int(count.max())
    local = torch.where(valid, slots.long() - PAGE_TOKENS * first[:, None], -1)
    used = torch.arange(pages, device=slots.device) < count[:, None]
    offset = int(local[0, 0])
    steps = torch.arange(slots.shape[1], device=slots.device)
    dense = offset if bool((local == offset + steps).all()) else -1
    return Span(first, pages, local, used, dense, bool((start % PAGE_TOKENS).any()))


def _page_columns(span: Span, columns: int) -> Tensor:
    """Columns of the block table that are touched, int64 [B, pages], clamped to exist."""
    offsets = torch.arange(span.pages, device=span.first.device)
    return (span.first[:, None] + offsets).clamp(max=columns - 1)


def _encode(layout: PageLayout, key: Tensor, value: Tensor, tables: list[Tensor]) -> Codes:
    if layout.spec.lossless:
        return (RawCodes(key, value.to(key.dtype)),)
    constants = LayerTables(*tables)
    return (
        quantise_keys(key, constants, layout.spec),
        quantise_values(value, constants, layout.spec),
    )


def _decode(layout: PageLayout, pages: Tensor, dtype: torch.dtype) -> Codes:
    if layout.spec.lossless:
        return (RawCodes(*unpack_raw(layout, pages, dtype)),)
    return unpack_keys(layout, pages), unpack_values(layout, pages)


def _merge(old: Any, new: Any, span: Span) -> Any:
    """``old`` (or zeros) with the step's tokens put in, of one kind of codes."""
    out: dict[str, Tensor | None] = {}
    for f in fields(new):
        source: Tensor | None = getattr(new, f.name)
        if source is None:
            out[f.name] = None
            continue
        shape = (*source.shape[:2], span.pages * PAGE_TOKENS, *source.shape[3:])
        buffer = source.new_zeros(shape) if old is None else getattr(old, f.name).contiguous()
        out[f.name] = _place(buffer, source, span)
    return type(new)(**out)


def _place(buffer: Tensor, source: Tensor, span: Span) -> Tensor:
    """Write tokens [B, H, S, ...] into [B, H, N, ...] at their local places."""
    if span.dense >= 0:
        buffer[:, :, span.dense : span.dense + source.shape[2]] = source
        return buffer
    row, step = (span.local >= 0).nonzero(as_tuple=True)
    buffer[row, :, span.local[row, step]] = source[row, :, step]
    return buffer


def _pack(layout: PageLayout, codes: list) -> Tensor:
    if layout.spec.lossless:
        return pack_raw(codes[0].keys, codes[0].values)
    return pack_quantised(layout, codes[0], codes[1])
