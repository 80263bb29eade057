"""``append`` and ``attend`` as functions of an exported graph: the cache comes in and goes out.

Pages are [batch, pages, heads, page_bytes]: page ``n`` of a sequence holds its tokens ``64 n`` to
``64 n + 63``, so no block table is needed. A token's position is its place in its sequence.
Nothing depends on data but values, so that shapes are known before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.order import reorder
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.export.codec_steps import (
    KEY_READ,
    VALUE_READ,
    Emit,
    Function,
    Outputs,
    dequantiser,
    packer,
    quantiser,
    unpacker,
)
from kvquant_compile.export.signature import Argument, Signature, tensors_like

_I64, _F32 = torch.int64, torch.float32


@dataclass(frozen=True, eq=False)
class LayerStore:
    """What an exported graph needs to know of one layer's cache.

    Attributes:
        layout: of the pages.
        tables: calibrated constants that are not empty, by name.
        geometry: key_order, query_order, frequencies, rope_scale, where not empty.
        dtype: of the exact tokens.
    """

    layout: PageLayout
    tables: dict[str, Tensor]
    geometry: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def cache(self) -> tuple[Argument, Argument]:
        """The layer's pages and exact tokens."""
        layout = self.layout
        exact = (layout.heads, layout.exact_rows, layout.exact_width)
        return (
            Argument("pages", torch.uint8, ("batch", "capacity", layout.heads, layout.page_bytes)),
            Argument("sinks", self.dtype, ("batch", *exact)),
        )

    def kind(self, kind: str) -> dict[str, Tensor]:
        """The tables of "key" or "value"."""
        return {name: x for name, x in self.tables.items() if name.startswith(kind)}

    def only(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of the tables and of the geometry, as far as they are there."""
        every = self.tables | self.geometry
        return {name: every[name] for name in names if name in every}


def appender(store: LayerStore) -> Function:
    """``append``: a step's tokens into the cache.

    Inputs: keys before RoPE [batch, H, sequence, key_dim], values, slots int64 [batch, sequence]
    (-1 for padding; the real ones of a row are consecutive), pages, sinks, constants.
    """
    layout, named = store.layout, {**store.only(("key_order",)), **store.tables}
    step = ("batch", layout.heads, "sequence")

    def body(emit: Emit, given: Sequence[Tensor]) -> Outputs:
        key, value, slots, pages, sinks = given[:5]
        constants = dict(zip(named, given[5:], strict=True))
        key = reorder(key, constants.get("key_order", torch.empty(0)))
        fields: list[Tensor] = []
        for kind, x in (("key", key), ("value", value)):
            tables = store.kind(kind)
            chosen = [constants[name] for name in tables]
            fields += emit(quantiser(layout, kind, tables), [_flat(x.float()), *chosen])
        pages = _write(emit, layout, fields, slots, pages)
        tokens = torch.cat([key.to(sinks.dtype), value.to(sinks.dtype)], -1)
        return pages, _write_sinks(sinks, tokens, slots)

    inputs = (
        Argument("key", store.dtype, (*step, layout.key_dim)),
        Argument("value", store.dtype, (*step, layout.value_dim)),
        Argument("slots", _I64, ("batch", "sequence")),
        *store.cache,
        *tensors_like(named),
    )
    outputs = tuple(Argument(f"new_{x.name}", x.dtype, x.shape) for x in store.cache)
    return Function(
        "append",
        f"{layout} {'+'.join(named)}",
        "Quantises a step's tokens and sets their bits in the pages.",
        Signature(inputs, outputs),
        body,
    )


def _flat(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [1, H, B S, D]."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _write(
    emit: Emit, layout: PageLayout, fields: Sequence[Tensor], slots: Tensor, pages: Tensor
) -> Tensor:
    """Put a step's codes, each [1, H, B S, ...], into pages [B, P, H, bytes]."""
    batch, capacity = pages.shape[:2]
    touched = torch.sym_min((slots.shape[1] + PAGE_TOKENS - 2) // PAGE_TOKENS + 1, capacity)
    start, end = _span(slots)
    first = (start // PAGE_TOKENS).clamp(max=capacity - touched)
    ids = first[:, None] + torch.arange(touched)
    places = (ids[..., None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten(1)
    new, column = _new_tokens(slots, places)
    source = (column + torch.arange(batch)[:, None] * slots.shape[1]).flatten()
    # Tokens beyond the last page must not be lost in silence: no page has such a number.
    lacking = ((end - 1) // PAGE_TOKENS - (capacity - 1)).clamp(min=0) * (batch * capacity)
    mine = (ids + (torch.arange(batch) * capacity + lacking)[:, None]).flatten()
    flat = pages.flatten(0, 1)
    old = flat.index_select(0, mine).transpose(0, 1)[None]  # [1, H, B touched, bytes]
    known = [x for kind in ("key", "value") for x in emit(unpacker(layout, kind), [old])]
    merged = []
    for field_, before in zip(fields, known, strict=True):
        chosen = field_.index_select(2, source).unflatten(2, (-1, PAGE_TOKENS))
        mask = new.flatten().view(1, 1, -1, PAGE_TOKENS, *[1] * (chosen.ndim - 4))
        merged.append(torch.where(mask, chosen, before))
    (packed,) = emit(packer(layout), merged)
    return flat.index_put((mine,), packed[0].transpose(0, 1)).view_as(pages)


def _write_sinks(sinks: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    """Keep the first tokens of every sequence exactly: tokens [B, H, S, width]."""
    rows = sinks.shape[2]
    if not rows:
        return sinks.clone()
    places = torch.arange(rows).expand(slots.shape[0], -1)
    new, column = _new_tokens(slots, places)
    index = column[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
    return torch.where(new[:, None, :, None], tokens.gather(2, index), sinks)


def _span(slots: Tensor) -> tuple[Tensor, Tensor]:
    """First slot of every row's new tokens and the one after the last, int64 [B] each."""
    end = slots.amax(1) + 1
    return end - (slots >= 0).sum(1), end


def _new_tokens(slots: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Which slots ``places`` [B, n] are the step's, and the columns of their tokens there."""
    real, steps = slots >= 0, slots.shape[1]
    rank = torch.where(real, real.long().cumsum(1) - 1, steps)
    empty = torch.zeros_like(torch.nn.functional.pad(slots, (0, 1)))
    columns = empty.scatter(1, rank, torch.arange(steps).expand_as(slots))
    start, end = _span(slots)
    new = (places >= start[:, None]) & (places < end[:, None])
    return new, columns.gather(1, (places - start[:, None]).clamp(0, steps - 1))


def reader(store: LayerStore) -> Function:
    """``read``: keys before RoPE and values [batch, H, tokens, D] of the whole cache."""
    layout = store.layout
    named = store.only((*KEY_READ, *VALUE_READ))

    def body(emit: Emit, given: Sequence[Tensor]) -> Outputs:
        pages, sinks = given[:2]
        constants = dict(zip(named, given[2:], strict=True))
        flat = pages.flatten(0, 1).transpose(0, 1)[None]  # [1, H, B P, bytes]
        out = []
        at = 0
        for kind, names in (("key", KEY_READ), ("value", VALUE_READ)):
            codes = [x.flatten(2, 3) for x in emit(unpacker(layout, kind), [flat])]
            tables = {name: constants[name] for name in names}
            (x,) = emit(dequantiser(layout, kind, tables), [*codes, *tables.values()])
            whole = x[0].unflatten(1, (pages.shape[0], -1)).transpose(0, 1)
            exact = sinks[..., at : at + x.shape[-1]].float()
            out.append(torch.cat([exact, whole[:, :, exact.shape[2] :]], 2))
            at += x.shape[-1]
        return out[0].unflatten(2, (-1, PAGE_TOKENS)), out[1].unflatten(2, (-1, PAGE_TOKENS))

    shape = ("batch", layout.heads, "capacity", PAGE_TOKENS)
    outputs = (
        Argument("keys", _F32, (*shape, padded(layout.key_dim))),
        Argument("values", _F32, (*shape, layout.value_dim)),
    )
    return Function(
        "read",
        str(layout),
        "Keys before RoPE and values of the whole cache, exact tokens in their places.",
        Signature((*store.cache, *tensors_like(named)), outputs),
        body,
    )
