"""The two ops of a rewritten graph, ``kvquant::append`` and ``kvquant::attend``.

Both take the cache as plain tensors, so that graphs can be exported, compiled and captured:

* ``pages``: slabs uint8 [pages, heads, page_bytes]; page ids count through the slabs.
* ``table``: int32 [B, n], page id of every 64 tokens of every sequence.
* ``sinks``: [B, heads, rows, key width + value width], exact tokens, see :mod:`.recent`.
* ``slots``: int32 [B, S], place in its sequence of every token of the step; -1 for padding.
* ``history``: int32 [B], tokens each sequence had stored before the step.
* ``positions``: int32 [B, 64 n], position of every stored token (RoPE is applied on reading);
  negative where a token is hidden from all queries.
* ``tables``, ``geometry``: the layer's constants (:class:`~.constants.LayerConstants`).
* ``format``: the page layout as a string.
* ``chunk``: a query sees the keys of its own chunk of so many slots only; 0 for no chunks.
* ``selected``: bool [B, S, n], which slots every query may attend to at all; n at least the tokens
  of the longest sequence.
* ``sink_logits``: [Hq], or [B, Hq, S, 1] where every query has its own.
* ``distance_logits``: [B, Hq, S, extent]; a query's scores of the keys 0, 1, ... extent - 1 slots
  before it change by these.
* ``slopes``: float32 [Hq]; a score changes by ``slope * (key's slot - query's)`` (ALiBi).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kvquant_compile.errors import OptionError
from kvquant_compile.lowering import append as _append
from kvquant_compile.lowering import attend as _attend
from kvquant_compile.lowering.cpp import dispatch as _cpp
from kvquant_compile.lowering.triton import dispatch as _dispatch

_LIBRARY = torch.library.Library("kvquant", "DEF")

_LIBRARY.define(
    "append(Tensor key, Tensor value, Tensor slots, Tensor table, Tensor(a!)[] pages,"
    " Tensor(b!) sinks, Tensor[] tables, Tensor[] geometry, str format) -> ()"
)
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor slots, Tensor history, Tensor table,"
    " Tensor positions, Tensor[] pages, Tensor sinks, Tensor[] tables, Tensor[] geometry,"
    " Tensor? sink_logits, float scale, float softcap, int window, bool exact_chunk, str format,"
    " Tensor? slopes=None, int chunk=0, Tensor? selected=None,"
    " Tensor? distance_logits=None) -> (Tensor, Tensor)"
)


def _append_impl(
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
    # The cache must not drag the step's autograd graph along.
    with torch.no_grad(), _precise(key):
        run = _cpp.append_implementation(key, format) or _append.append
        if _dispatch.use_kernels(key, format):
            run = _dispatch.append
        run(key, value, slots, table, pages, sinks, tables, geometry, format)


def _attend_impl(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    history: Tensor,
    table: Tensor,
    positions: Tensor,
    pages: list[Tensor],
    sinks: Tensor,
    tables: list[Tensor],
    geometry: list[Tensor],
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    exact_chunk: bool,
    format: str,
    slopes: Tensor | None = None,
    chunk: int = 0,
    selected: Tensor | None = None,
    distance_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    cache = _attend.CacheView(table, positions, pages, sinks, tables, geometry, format)
    extras = slopes, chunk, selected, distance_logits
    site = _attend.Site(scale, softcap, window, sink_logits, *extras)
    # Few tokens are all among the last of each other.
    exact_chunk = exact_chunk or query.shape[2] <= cache.recent
    of_queries = sink_logits is not None and sink_logits.ndim > 1
    plain = not site.biased and selected is None and not chunk and not of_queries
    run = (_cpp.attend_implementation(query, format) if plain else None) or _attend.attend
    if plain and _dispatch.use_kernels(query, format):
        run = _dispatch.attend
    with _precise(query):
        return run(query, key, value, slots, history, cache, site, exact_chunk)


def _precise(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off: what a page holds is defined by the codec's own precision."""
    kind = x.device.type
    on = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def _attend_fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, heads, steps, _ = query.shape
    output = query.new_empty(batch, steps, heads, value.shape[-1])
    return output, query.new_empty(batch, heads, steps, dtype=torch.float32)


_LIBRARY.impl("append", _append_impl, "CompositeExplicitAutograd")
_LIBRARY.impl("attend", _attend_impl, "CompositeExplicitAutograd")
torch.library.register_fake("kvquant::append", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("kvquant::attend", _attend_fake, lib=_LIBRARY)


def _no_gradient(ctx: object, *gradients: Tensor) -> None:
    raise OptionError(
        "no gradient flows through an optimised model",
        why="keys and values are rounded to a few bits, and attention reads only those",
        do="Use torch.no_grad() for inference, or kvquant_compile.restore(model) to train.",
    )


torch.library.register_autograd("kvquant::attend", _no_gradient, lib=_LIBRARY)

append = torch.ops.kvquant.append.default
attend = torch.ops.kvquant.attend.default
