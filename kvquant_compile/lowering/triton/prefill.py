"""``kvquant::attend`` for steps of many tokens: dequantise a block once, use it for all queries.

The history is dequantised block by block into a workspace whose size does not grow with it; the
chunk attends to every block, and to its own exact tokens, by flash attention; results are merged
by their log-sum-exps. Where masks are trivial the flash kernel is torch's, the one that the
original model would run; elsewhere it is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.attend import CacheView, Site
from kvquant_compile.lowering.torch_internals import device_flash
from kvquant_compile.lowering.triton.dequantise import Workspace, dequantise
from kvquant_compile.lowering.triton.flash import Part, finished, flash, merged

BLOCK_TOKENS = 16384


@dataclass(frozen=True)
class Bounds:
    """What the host knows of a step.

    Attributes:
        shortest, longest: tokens stored before the step, over the rows.
        top: largest slot of the step.
        padded: whether some tokens of the step are padding.
        hidden: whether some stored tokens are hidden.
    """

    shortest: int
    longest: int
    top: int
    padded: bool
    hidden: bool


@dataclass(frozen=True, eq=False)
class _Known:
    """Bounds as they were for these versions of slots, history and positions."""

    slots: Tensor
    versions: tuple[int, int, int]
    bounds: Bounds


_KNOWN = WeakTensorKeyDictionary()


def step_bounds(slots: Tensor, history: Tensor, cache: CacheView) -> Bounds:
    """Bounds of a step; waits for the device at the first layer of a forward pass.

    A captured CUDA graph must serve any length, so there the cache's capacity bounds it.
    """
    if slots.is_cuda and torch.cuda.is_current_stream_capturing():
        capacity = cache.table.shape[1] * PAGE_TOKENS
        return Bounds(0, capacity, capacity, padded=True, hidden=True)
    tensors = (slots, history, cache.positions)
    if any(x.is_inference() for x in tensors):  # these have no version
        return _read_bounds(*tensors)
    versions = (slots._version, history._version, cache.positions._version)
    known = _KNOWN.get(history)
    if known is not None and known.slots is slots and known.versions == versions:
        return known.bounds
    bounds = _read_bounds(*tensors)
    _KNOWN[history] = _Known(slots, versions, bounds)
    return bounds


def _read_bounds(slots: Tensor, history: Tensor, positions: Tensor) -> Bounds:
    extremes = (history.min(), history.max(), slots.min(), slots.max(), positions.min())
    shortest, longest, low, top, visible = torch.stack(extremes).tolist()
    return Bounds(shortest, longest, top, padded=low < 0, hidden=visible < 0)


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
    """As :func:`kvquant_compile.lowering.attend.attend`; all tensors with contiguous channels.

    Keys and values meet the query in its own dtype, sums are float32. Where a format has exact last
    tokens, a step that reads itself from the cache has more tokens than these. Needs room for
    ``BLOCK_TOKENS`` dequantised tokens, whatever the length of the history.
    """
    bounds = step_bounds(slots, history, cache)
    if bounds.top < site.window:  # every query sees everything
        site = replace(site, window=0)
    recent = 0 if exact_chunk else cache.recent
    parts = _history(query, slots, history, cache, site, bounds, exact_chunk or recent > 0)
    if recent:
        parts = chain(parts, _older(query, slots, history, cache, site, bounds))
        site = replace(site, window=min(recent, site.window or recent))
    done: Part | None = None
    for part in parts:
        done = part if done is None else merged(done, part)
    own = None
    if exact_chunk or recent:
        own = _own(query, key, value, slots, history, site, bounds)
    first, second = (done, own) if done is not None else (own, None)
    assert first is not None, "a step that reads itself from the cache has a block"
    result = finished(first, second, site.sink_logits, query.dtype)
    return result.output, result.lse


def _own(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    history: Tensor,
    site: Site,
    bounds: Bounds,
) -> Part:
    """The step's own exact tokens: by the very kernel that the original model runs, if it can."""
    key, value = key.to(query.dtype), value.to(query.dtype)
    if not (bounds.padded or site.window or site.softcap):
        odd = bounds.longest > 0 and query.shape[2] % PAGE_TOKENS != 0
        found = device_flash(query, key, value, site.scale, causal=True, new_shape=odd)
        if found is not None:
            return Part(*found)
    return flash(query, key, value, slots, slots, history, site, None, not bounds.padded)


def _history(
    query: Tensor,
    slots: Tensor,
    history: Tensor,
    cache: CacheView,
    site: Site,
    bounds: Bounds,
    exact_chunk: bool,
) -> Iterator[Part]:
    """The stored tokens, a block at a time; the step's own too unless those are read exactly."""
    limit, end = history, bounds.longest
    if not exact_chunk:
        limit, end = torch.maximum(history, slots.amax(1) + 1), max(end, bounds.top + 1, 1)
    begin = max(0, bounds.shortest - site.window + 1) if site.window else 0
    begin, end = begin // PAGE_TOKENS * PAGE_TOKENS, -(-end // PAGE_TOKENS) * PAGE_TOKENS
    if begin >= end:
        return
    block = min(block_tokens(query.shape[0]), end - begin)
    space = Workspace.empty(cache, block, query)
    dense = not (bounds.padded or bounds.hidden)
    even = dense and bounds.shortest == bounds.longest
    plain = exact_chunk and even and not (site.window or site.softcap)
    for first in range(begin, end, block):
        dequantise(cache, limit, first, space)
        found = None
        if plain:
            count = min(block, bounds.longest - first)
            keys, values = space.keys[:, :, :count], space.values[:, :, :count]
            odd = count < block or query.shape[2] % PAGE_TOKENS != 0
            found = device_flash(query, keys, values, site.scale, causal=False, new_shape=odd)
        if found is None:
            keys, values, places = space.keys, space.values, space.places
            yield flash(query, keys, values, slots, places, limit, site, first, dense)
        else:
            yield Part(*found)


def _older(
    query: Tensor,
    slots: Tensor,
    history: Tensor,
    cache: CacheView,
    site: Site,
    bounds: Bounds,
) -> Iterator[Part]:
    """The step's own tokens that are not among a query's last, as their pages hold them."""
    recent = cache.recent
    if site.window:
        if site.window <= recent:
            return
        site = replace(site, window=site.window - recent)
    begin = bounds.shortest // PAGE_TOKENS * PAGE_TOKENS
    end = -(-(bounds.top + 1) // PAGE_TOKENS) * PAGE_TOKENS
    stored = torch.maximum(history, slots.amax(1) + 1)
    block = min(block_tokens(query.shape[0]), end - begin)
    space = Workspace.empty(cache, block, query)
    for first in range(begin, end, block):
        dequantise(cache, stored, first, space)
        places = space.places.masked_fill(space.places < history[:, None], -1)
        # A query sees what is before its slot: where the pages' part for it ends.
        yield flash(query, space.keys, space.values, slots - recent, places, stored, site, first)


def block_tokens(batch: int) -> int:
    """Tokens of a row that are dequantised at a time: fewer for many rows, a multiple of 64."""
    tokens = max(BLOCK_TOKENS // 8, min(BLOCK_TOKENS, 4 * BLOCK_TOKENS // batch))
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS
