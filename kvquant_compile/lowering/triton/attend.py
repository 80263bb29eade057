"""``kvquant::attend`` through the generated kernels: two launches for decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.lowering.attend import CacheView, Site
from kvquant_compile.lowering.gluon import launch
from kvquant_compile.lowering.triton import prefill
from kvquant_compile.lowering.triton.compat import launch_options, native
from kvquant_compile.lowering.triton.dispatch import use_gluon
from kvquant_compile.lowering.triton.merge import merge_kernel
from kvquant_compile.lowering.triton.module import history_kernel
from kvquant_compile.lowering.triton.prepared import (
    Prepared,
    page_addresses,
    prepared,
    split_count,
)
from kvquant_compile.lowering.triton.spec import KernelSpec

OWN_STEPS = 16
"""Steps of more tokens are prefill."""


def kernel_spec(layout: PageLayout, constants: Prepared, site: Site, columns: int) -> KernelSpec:
    """The kernel that an attention site needs for so many queries a kv head."""
    return KernelSpec(
        layout=layout,
        rotated=constants.rotated,
        explicit=constants.explicit,
        queries=4 if columns <= 4 else 8,
        softcap=site.softcap != 0,
        window=site.window != 0,
        reorder=constants.query_order.numel() > 0,
        stretched=constants.stretched,
    )


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
    """As :func:`kvquant_compile.lowering.attend.attend`, without host synchronisation
    for steps of up to ``OWN_STEPS`` tokens; longer ones go to :mod:`.prefill`. Where a format has
    exact last tokens, the tokens of such a step are among them: ``exact_chunk`` must be true.

    Products are float16 with float32 sums, whatever the dtype of the query.
    """
    layout = cache.layout
    query, key, value = (_rows(x) for x in (query, key, value))
    if query.shape[2] > OWN_STEPS:
        return prefill.attend(query, key, value, slots, history, cache, site, exact_chunk)
    if use_gluon(layout, query.device):
        return launch.attend(query, key, value, slots, history, cache, site, exact_chunk)
    partial, partial_lse = _attend_pages(query, slots, history, cache, site, exact_chunk)
    constants = prepared(layout, cache.tables, cache.geometry)
    return _merge(
        partial, partial_lse, query, key, value, slots, history, cache, site, constants, layout,
        exact_chunk,
    )  # fmt: skip


def _attend_pages(
    query: Tensor, slots: Tensor, history: Tensor, cache: CacheView, site: Site, exact_chunk: bool
) -> tuple[Tensor, Tensor]:
    """Attention to the pages by the portable kernel.

    Returns:
        float32 [B H, tiles, splits, columns, value_dim], normalised, and log2-sum-exps
        [B H, tiles, splits, columns]; a column is (query head of the group, step).
    """
    layout = cache.layout
    constants = prepared(layout, cache.tables, cache.geometry)
    batch, query_heads, steps, _ = query.shape
    rep = query_heads // layout.heads
    spec = kernel_spec(layout, constants, site, rep * steps)
    ring = [cache.sinks] if layout.ring else []
    tiles = -(-rep * steps // spec.queries)
    splits = split_count(batch * layout.heads * tiles, cache.table.shape[1], query.device)
    shape = (batch * layout.heads, tiles, splits, spec.queries)
    partial = query.new_empty(*shape, layout.value_dim, dtype=torch.float32)
    partial_lse = query.new_empty(shape, dtype=torch.float32)
    history_kernel(spec)[(batch * layout.heads, splits, tiles)](
        query, constants.query_order, slots, history, cache.table, cache.positions,
        page_addresses(cache.pages), constants.key_words, constants.turn_words,
        constants.zero_words, constants.query_terms, constants.key_unit, constants.key_bytes,
        constants.value_bytes, constants.turns, constants.rope_scale, constants.gain,
        constants.offset, partial, partial_lse, *ring,
        site.scale, site.softcap, site.window, layout.heads, rep, steps, splits,
        query.stride(0), query.stride(1), query.stride(2), cache.table.stride(0),
        cache.positions.stride(0), slots.stride(0), layout.page_bytes,
        EXACT=exact_chunk, SINKS=layout.sink_tokens, STEPS_POW2=_pow2(steps), NATIVE=native(),
        **launch_options(num_warps=spec.warps, num_stages=1),
    )  # fmt: skip
    return partial, partial_lse


def _merge(
    partial: Tensor,
    partial_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    history: Tensor,
    cache: CacheView,
    site: Site,
    constants: Prepared,
    layout: PageLayout,
    exact_chunk: bool,
) -> tuple[Tensor, Tensor]:
    batch, query_heads, steps, dim = query.shape
    _, tiles, splits, columns = partial_lse.shape
    output = query.new_empty(batch, steps, query_heads, layout.value_dim)
    lse = query.new_empty(batch, query_heads, steps, dtype=torch.float32)
    logits = site.sink_logits
    pairs = constants.turns.numel()
    sinks = layout.sink_tokens
    options: dict[str, Any] = launch_options(num_warps=4)
    merge_kernel[(batch * query_heads, steps)](
        partial, partial_lse, query, key, value, slots, cache.positions, history, cache.sinks,
        lse if logits is None else logits, constants.query_order, constants.turns,
        constants.rope_scale, output, lse,
        site.scale, site.softcap, site.window, layout.heads, query_heads // layout.heads, steps,
        splits, columns, tiles, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        slots.stride(0), cache.positions.stride(0),
        DIM=dim, VALUE_DIM=layout.value_dim, DIM_POW2=_pow2(dim),
        VALUE_POW2=_pow2(layout.value_dim), PAIRS=pairs, PAIRS_POW2=_pow2(pairs), SINKS=sinks,
        SINKS_POW2=_pow2(sinks), RING=layout.ring, OWN=_pow2(steps) if exact_chunk else 0,
        EXACT=exact_chunk, CAP=site.softcap != 0, WINDOW=site.window != 0,
        LOGITS=logits is not None, ORDER=constants.query_order.numel() > 0,
        ROPE=constants.rotated > 0, NATIVE=native(), **options,
    )  # fmt: skip
    return output, lse


def _rows(x: Tensor) -> Tensor:
    """The tensor with contiguous channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
