"""The two ops as themselves, for graphs that run where this package is installed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvquant_compile.codec.spec import PAGE_TOKENS, LayerTables
from kvquant_compile.export.attend_step import Attention
from kvquant_compile.export.cache_steps import LayerStore
from kvquant_compile.export.step import GEOMETRY, Cache
from kvquant_compile.lowering import ops


class NativeOps:
    """Calls ``kvquant::append`` and ``kvquant::attend``, which change pages and sinks in place."""

    def append(
        self,
        store: LayerStore,
        step: tuple[Tensor, Tensor, Tensor],
        cache: Cache,
        constants: Mapping[str, Tensor],
    ) -> Cache:
        """The same tensors, changed."""
        key, value, slots = step
        table, slab = _paged(cache[0])
        lists = _lists(constants)
        ops.append(key, value, slots.int(), table, [slab], cache[1], *lists, str(store.layout))
        return cache

    def attend(
        self,
        store: LayerStore,
        site: Attention,
        step: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        cache: Cache,
        constants: Mapping[str, Tensor],
    ) -> Tensor:
        """Attention over the cache and the step."""
        query, key, value, slots, lengths = step
        table, slab = _paged(cache[0])
        batch, capacity = table.shape
        places = torch.arange(capacity * PAGE_TOKENS, dtype=torch.int32, device=slab.device)
        output: Tensor = ops.attend(
            query, key, value, slots.int(), lengths.int(), table,
            places.expand(batch, -1).contiguous(), [slab], cache[1], *_lists(constants),
            site.extras.get("sink_logits"), site.scale, site.softcap, site.window,
            site.exact_chunk, str(store.layout), site.extras.get("slopes"), site.chunk,
        )[0]  # fmt: skip
        return output


def _paged(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Block table and slab of pages [batch, capacity, heads, bytes]."""
    batch, capacity = pages.shape[:2]
    ids = torch.arange(batch * capacity, dtype=torch.int32, device=pages.device)
    return ids.view(batch, capacity), pages.view(batch * capacity, *pages.shape[2:])


def _lists(constants: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Tables and geometry in the order of the ops, which take empty ones too."""
    device = next(iter(constants.values())).device

    def listed(names: tuple[str, ...], empty: torch.dtype) -> list[Tensor]:
        return [constants.get(name, torch.empty(0, dtype=empty, device=device)) for name in names]

    return (
        listed(tuple(LayerTables.__dataclass_fields__), torch.int8),
        [*listed(GEOMETRY[:2], torch.int64), *listed(GEOMETRY[2:], torch.float32)],
    )
