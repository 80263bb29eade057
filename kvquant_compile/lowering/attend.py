"""``kvquant::attend`` in plain torch: attention over packed pages, a few pages at a time.

No full-precision copy of the cache ever exists: a block of pages is dequantised, rotated,
used for all queries and dropped. The softmax runs online (Milakov & Gimelshein, arXiv
1805.02867), so that blocks, the step's own exact tokens and learned sink logits merge alike.
All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.formats import Layout, parse_layout
from kvquant_compile.codec.layout import PageLayout, unpack_raw
from kvquant_compile.codec.order import reorder
from kvquant_compile.codec.spec import PAGE_TOKENS, LayerTables
from kvquant_compile.lowering import blocks
from kvquant_compile.lowering.flash import history_by_flash, own_by_flash
from kvquant_compile.lowering.masks import (
    both,
    left_to_pages,
    places_of,
    same_chunk,
    visible_slots,
)
from kvquant_compile.lowering.pages import gather_pages
from kvquant_compile.lowering.read import read_keys, read_values
from kvquant_compile.lowering.recent import put_exact
from kvquant_compile.lowering.score_bias import Bias, score_bias
from kvquant_compile.lowering.softmax import OnlineSoftmax

BLOCK_PAGES = 64
QUERY_TILE = 128


@dataclass(frozen=True, eq=False)
class CacheView:
    """One layer's cache as the op receives it; see :mod:`kvquant_compile.lowering.ops`."""

    table: Tensor
    positions: Tensor
    pages: list[Tensor]
    sinks: Tensor
    tables: list[Tensor]
    geometry: list[Tensor]
    format: str

    @property
    def layout(self) -> PageLayout:
        """The page layout of a format that is no recipe; raises ValueError on one that is."""
        return PageLayout.parse(self.format)

    @property
    def storage(self) -> Layout:
        """The page layout, of either kind."""
        return parse_layout(self.format)

    @property
    def recent(self) -> int:
        """Last tokens, seen from any query, that are exact; of a recipe none, whose tail is that of
        the whole sequence."""
        layout = self.storage
        return layout.ring if isinstance(layout, PageLayout) else 0


@dataclass(frozen=True, eq=False)
class Site:
    """What one attention site does with scores; see :class:`kvquant_compile.plan.AttendPlan`."""

    scale: float
    softcap: float
    window: int
    sink_logits: Tensor | None
    slopes: Tensor | None = None
    chunk: int = 0
    selected: Tensor | None = None
    distance_logits: Tensor | None = None

    @property
    def biased(self) -> bool:
        """Whether something is added to scores by the distance of their tokens."""
        return self.slopes is not None or self.distance_logits is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    history: Tensor,
    cache: CacheView,
    site: Site,
    exact_chunk: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of a step's queries over the cache.

    Args:
        query: [B, Hq, S, key_dim], rotated.
        key: [B, H, S, key_dim], the step's own keys, rotated.
        value: [B, H, S, value_dim], the step's own values.
        slots, history: see :mod:`kvquant_compile.lowering.ops`; padding gets zeros and -inf.
        cache: the layer's cache, the step already appended.
        site: scale, softcap, window, sink logits, slopes or logits of a position bias, length of
            chunks, and which slots every query may see.
        exact_chunk: read the step's own tokens exactly instead of from the cache, whose last
            tokens (:attr:`CacheView.recent`) are exact for every query by itself.

    Returns:
        output [B, S, Hq, value_dim] in the query's dtype, and the log-sum-exp of the scores
        [B, Hq, S] float32.
    """
    stored = torch.maximum(history, slots.amax(1) + 1)
    limit = history if exact_chunk else stored
    recent = 0 if exact_chunk else cache.recent
    own = own_by_flash(query, key, value, slots, site) if exact_chunk else None
    if own is not None and site.sink_logits is None and not int(limit.max()):
        return own[0].transpose(1, 2).to(query.dtype).contiguous(), own[1]
    heads, lossless = cache.storage.heads, cache.storage.lossless
    groups = (heads, query.shape[1] // heads)
    ordered = reorder(query, cache.geometry[1]).unflatten(1, groups)
    grouped = ordered.float() * site.scale
    state = OnlineSoftmax(grouped.shape[:-1], value.shape[-1], query.device)
    for first, keys, values in _blocks(cache, slots, limit, stored, site.window, query):
        places = places_of(first, keys)
        visible = _visible(cache, site, slots, limit, slice(first, first + keys.shape[2]))
        if recent:
            visible = both(visible, left_to_pages(slots, places, history, recent))
        fast = visible is None and not lossless
        if fast and history_by_flash(state, ordered, keys, values, site):
            continue
        bias = score_bias(site, slots, places, groups)
        _update(state, grouped, keys, values, visible, site.softcap, bias)
    if own is not None:
        state.merge(slice(None), *(x.unflatten(1, groups) for x in own))
    elif exact_chunk or recent:
        _attend_own(state, grouped, reorder(key, cache.geometry[1]), value, slots, site, recent)
    output, lse = state.result(site.sink_logits)
    return (
        output.flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous(),
        lse.flatten(1, 2),
    )


def _visible(
    cache: CacheView, site: Site, slots: Tensor, limit: Tensor, places: slice
) -> Tensor | None:
    """Which slots of a block the site's queries may see, bool [B, S, N]; None: each sees all."""
    hidden = cache.positions[:, places] < 0
    visible = visible_slots(slots, places.start, hidden, limit, site.window, site.chunk)
    return visible if site.selected is None else both(visible, site.selected[:, :, places])


def _blocks(
    cache: CacheView, slots: Tensor, limit: Tensor, stored: Tensor, window: int, query: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first slot, rotated keys, values) of every block that a query can see, float32.

    ``limit`` [B] tokens may be seen of the ``stored`` [B] that the cache holds by now.
    """
    shortest, longest = int(limit.min()), int(limit.max())
    end = -(-longest // PAGE_TOKENS)
    start = 0
    if window:
        oldest = int(torch.where(slots >= 0, slots, slots.new_full((), 2**30)).min())
        start = max(0, oldest - window + 1) // PAGE_TOKENS
    for page in range(start, end, BLOCK_PAGES):
        last = min(end, page + BLOCK_PAGES)
        keys, values = read_block(cache, page, last, stored, query.dtype)
        first = page * PAGE_TOKENS
        count = min(longest, last * PAGE_TOKENS) - first
        keys, values = keys[:, :, :count], values[:, :, :count]
        if shortest < first + count:
            # What a shorter sequence once had there may be NaN, which survives a weight of zero.
            beyond = torch.arange(first, first + count, device=limit.device) >= limit[:, None]
            values = values.masked_fill(beyond[:, None, :, None], 0)
        yield first, rotate(keys, cache.positions[:, first : first + count], cache), values


def read_block(
    cache: CacheView, page: int, end: int, stored: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys in pair order, not rotated, [B, H, N, 2 P] and values [B, H, N, D] of the pages
    ``page`` to ``end``, float32; exact tokens in their places."""
    layout = cache.storage
    raw = gather_pages(cache.pages, cache.table[:, page:end].long())
    if isinstance(layout, BlockLayout):
        first = page * PAGE_TOKENS
        keys, values = blocks.read(layout, raw, cache.sinks, cache.tables, first, stored)
        return reorder(keys, cache.geometry[0]), values
    if layout.lossless:
        keys, values = (x.float() for x in unpack_raw(layout, raw, dtype))
    else:
        tables = LayerTables(*cache.tables)
        keys, values = read_keys(layout, raw, tables), read_values(layout, raw, tables)
    if layout.exact_rows:
        first = page * PAGE_TOKENS
        put_exact(keys, values, cache.sinks, first, layout.sink_tokens, layout.ring)
    return keys, values


def rotate(keys: Tensor, positions: Tensor, cache: CacheView) -> Tensor:
    """RoPE on keys in pair order, with the model's own float32 arithmetic.

    Args:
        keys: float32 [B, H, N, 2 P].
        positions: int32 [B, N].
    """
    frequencies, scale = cache.geometry[2:]
    if frequencies.numel() == 0:
        return keys
    angle = positions[:, None, :, None].float() * frequencies
    cos, sin = angle.cos() * scale, angle.sin() * scale
    a, b = keys.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _attend_own(
    state: OnlineSoftmax,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    site: Site,
    recent: int,
) -> None:
    """The step's own tokens, exact, causal by column; a query's last ``recent`` if not 0."""
    window = min(recent, site.window or recent) if recent else site.window
    block = QUERY_TILE if recent else BLOCK_PAGES * PAGE_TOKENS
    steps = torch.arange(slots.shape[1], device=slots.device)
    for start in range(0, slots.shape[1], block):
        own = slots[:, start : start + block]
        seen = (steps[start : start + block] <= steps[:, None]) & (own >= 0)[:, None]
        if window:
            seen = seen & (own[:, None] > slots[..., None] - window)
        if site.chunk:
            seen = seen & same_chunk(slots[..., None], own[:, None], site.chunk)
        if site.selected is not None:
            places = own.clamp(min=0).long()[:, None].expand(-1, slots.shape[1], -1)
            seen = seen & site.selected.gather(2, places)
        tile = slice(start, start + block)
        keys, values = key[:, :, tile].float(), value[:, :, tile].float()
        bias = score_bias(site, slots, own, (query.shape[1], query.shape[2]))
        _update(state, query, keys, values, seen, site.softcap, bias, first_query=start)


def _update(
    state: OnlineSoftmax,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    softcap: float,
    bias: Bias | None = None,
    first_query: int = 0,
) -> None:
    """Merge one block of keys into the softmax of all queries from ``first_query`` on."""
    steps = query.shape[3]
    transposed = keys.transpose(-1, -2)
    for start in range(first_query, steps, QUERY_TILE):
        tile = slice(start, min(steps, start + QUERY_TILE))
        mask = None if visible is None else visible[:, tile]
        if mask is not None and not bool(mask.any()):
            continue
        part = query[:, :, :, tile]
        scores = (part.flatten(2, 3) @ transposed).unflatten(2, part.shape[2:4])
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores = scores + bias(tile)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        state.update(tile, scores, values)
