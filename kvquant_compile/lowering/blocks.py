"""Pages under a recipe in plain torch: packing whole units, and the exact tail behind them.

A token goes into the exact rows first, and into a page with the rest of its unit once the
recipe's tail lets go of it. Packing starts from exact tokens, so pages do not depend on how the
tokens came. The ring remembers which tokens its rows hold (:mod:`.recent`). A cropped sequence
whose tail has been packed goes on from what the pages give back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.layout import BlockLayout, Section
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.pages import gather_pages, slabs_in_use
from kvquant_compile.lowering.recent import keep_exact, ring_span

_FAR = 2**30


def append(
    layout: BlockLayout,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    table: Tensor,
    pages: list[Tensor],
    sinks: Tensor,
    tables: list[Tensor],
) -> None:
    """Store a step's tokens, keys in the model's channel order; shapes as in :mod:`.ops`."""
    real = slots >= 0
    if not bool(real.any()):
        return
    tokens = torch.cat([key.to(sinks.dtype), value.to(sinks.dtype)], -1)
    end = slots.amax(1).long() + 1
    start = end - real.sum(1)
    order = torch.where(real, slots, _FAR).argsort(1)  # steps of the row's new tokens
    constants = layout.recipe.constants(tables)
    parts = zip(layout.recipe.kinds(), layout.sections, constants, strict=True)
    for (kind, codec, tail), section, constant in parts:
        first, last = (tail.packed(codec.tokens, n) for n in (start, end))
        count = int((last - first).max())
        if count <= 0:
            continue
        places = first[:, None] + torch.arange(count, device=slots.device)
        row, known = _exact_rows(layout, sinks, places)
        index = (places - start[:, None]).clamp(0, order.shape[1] - 1)
        new = _take(tokens, order.gather(1, index))
        if bool(known.any()):
            before = (known & (places < start[:, None]))[:, None, :, None]
            new = torch.where(before, _take(sinks, row), new)
        x = _channels(layout, new, kind).float()
        lost = (places < start[:, None]) & ~known
        if bool(lost.any()):
            old = _packed_tokens(section, table, pages, places, constant)
            x = torch.where(lost[:, None, :, None], old, x)
        units = codec.encode_bytes(x.unflatten(2, (-1, codec.tokens)), constant)
        _write_units(section, units, places, last, table, pages)
    keep_exact(sinks, tokens, slots, layout.sink_tokens, layout.ring)


def read(
    layout: BlockLayout,
    raw: Tensor,
    sinks: Tensor,
    tables: list[Tensor],
    first: int,
    stored: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys (not rotated) and values of consecutive pages, exact tokens in their places.

    Args:
        layout: the page layout.
        raw: uint8 [B, H, n, page_bytes].
        sinks: the exact rows.
        tables: the recipe's constants.
        first: slot of the pages' first token.
        stored: [B], tokens of every sequence.

    Returns:
        float32 [B, H, 64 n, key_dim] and [B, H, 64 n, value_dim], the model's channel order.
    """
    count = raw.shape[2] * PAGE_TOKENS
    places = torch.arange(first, first + count, device=raw.device).expand(raw.shape[0], -1)
    row, known = _exact_rows(layout, sinks, places)
    exact = _take(sinks, row) if bool(known.any()) else None
    out = []
    constants = layout.recipe.constants(tables)
    parts = zip(layout.recipe.kinds(), layout.sections, constants, strict=True)
    for (kind, codec, tail), section, constant in parts:
        x = section.read(raw, constant)
        packed = tail.packed(codec.tokens, stored.long())[:, None]
        if exact is not None:
            use = known & ((places >= packed) | (places < layout.sink_tokens))
            x = torch.where(use[:, None, :, None], _channels(layout, exact, kind).float(), x)
        out.append(x)
    return out[0], out[1]


def _channels(layout: BlockLayout, rows: Tensor, kind: str) -> Tensor:
    """The keys or the values of exact rows [..., width]."""
    return rows[..., : layout.key_dim] if kind == "key" else rows[..., layout.key_dim :]


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, H, S, W] at places [B, n] -> [B, H, n, W]."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    return tokens.transpose(1, 2)[batch, index].transpose(1, 2)


def _exact_rows(layout: BlockLayout, sinks: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The exact row of every token [B, n], and whether it is that token's, bool [B, n]."""
    count = layout.sink_tokens
    early = places < count
    row, known = places.clamp(max=max(count - 1, 0)), early
    if layout.ring:
        low, end = (x[:, None] for x in ring_span(sinks))
        recent = (places >= low) & (places < end)
        row = torch.where(early, places, count + places % layout.ring)
        known = early | recent
    return row, known


def _packed_tokens(
    section: Section, table: Tensor, pages: list[Tensor], places: Tensor, constants: tuple
) -> Tensor:
    """Tokens [B, H, n, dim] at consecutive places [B, n], as their pages give them back."""
    first = places[:, :1] // PAGE_TOKENS
    count = -(-places.shape[1] // PAGE_TOKENS) + 1
    columns = first + torch.arange(count, device=places.device)
    ids = table.gather(1, columns.clamp(max=table.shape[1] - 1)).long()
    found = section.read(gather_pages(pages, ids), constants)
    return _take(found, places - PAGE_TOKENS * first)


def _write_units(
    section: Section,
    units: Tensor,
    places: Tensor,
    last: Tensor,
    table: Tensor,
    pages: list[Tensor],
) -> None:
    """Write units uint8 [B, H, U, bytes] of tokens [B, n], those below ``last`` [B]."""
    starts = places[:, :: section.codec.tokens]
    row, unit = (starts < last[:, None]).nonzero(as_tuple=True)
    start = starts[row, unit]
    ids = table[row, start // PAGE_TOKENS].long()
    offset = start % PAGE_TOKENS // section.codec.tokens
    data = units[row, :, unit]
    for slab, mine, local in slabs_in_use(pages, ids):
        section.view(slab)[local, :, offset[mine]] = data[mine]
