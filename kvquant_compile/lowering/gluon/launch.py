"""Launches the Gluon kernel: which kernel, how many splits, how many registers."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.lowering.attend import CacheView, Site
from kvquant_compile.lowering.gluon.constants import (
    GluonConstants,
    column_groups,
    gluon_constants,
    series_terms,
)
from kvquant_compile.lowering.gluon.memory import Memory
from kvquant_compile.lowering.gluon.module import gluon_kernel
from kvquant_compile.lowering.gluon.spec import GluonSpec, unsupported
from kvquant_compile.lowering.remembered import Remembered
from kvquant_compile.lowering.triton.compat import interpreting
from kvquant_compile.lowering.triton.dispatch import choice
from kvquant_compile.lowering.triton.prepared import page_addresses

LANE_COPIES, BULK_COPIES = 8, 9
"""Major compute capabilities from which GPUs have either way to copy (see :mod:`.copies`)."""

TRITON_BYTES, RESERVED_BYTES = 2048, 1024
"""Shared memory of a program besides ours: Triton's own at most, and the device's."""

COUNTER_WORDS = 256
"""Counters of different heads must not share a memory sector: same-sector atomics queue up."""


def applies(layout: PageLayout, device: torch.device) -> bool:
    """Whether this back end runs a format on a device."""
    if device.type != "cuda" or torch.version.hip or interpreting() or unsupported(layout):
        return False
    if torch.cuda.get_device_capability(device)[0] < LANE_COPIES:
        return False
    most = shared_memory(device) - RESERVED_BYTES - TRITON_BYTES  # that one program may have
    return Memory.bound(layout) <= most


def bulk_copies(device: torch.device) -> bool:
    """Whether pages come by the copy engine."""
    has_engine = torch.cuda.get_device_capability(device)[0] >= BULK_COPIES
    return has_engine and choice() != "ampere"


def gluon_spec(
    layout: PageLayout, constants: GluonConstants, site: Site, columns: int, *, bulk: bool
) -> GluonSpec:
    """The kernel that an attention site needs for ``columns`` queries a kv head, for which the
    constants were made."""
    return GluonSpec(
        layout=layout,
        rotates=constants.rotates,
        explicit=constants.explicit,
        groups=column_groups(columns),
        softcap=site.softcap != 0,
        window=site.window != 0,
        reorder=constants.query_order.numel() > 0,
        stretched=constants.stretched,
        dynamic=not torch.are_deterministic_algorithms_enabled(),
        bulk=bulk,
        terms=constants.terms,
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
    """As :func:`kvquant_compile.lowering.attend.attend`, in one launch.

    Queries, keys and values have contiguous channels. Where a format has exact last tokens, the
    step's are among them: ``exact_chunk`` must be true.
    """
    layout = cache.layout
    batch, query_heads, steps, _ = query.shape
    rep = query_heads // layout.heads
    constants = _constants(layout, cache.tables, cache.geometry, rep * steps)
    spec = gluon_spec(layout, constants, site, rep * steps, bulk=bulk_copies(query.device))
    tiles = -(-rep * steps // spec.columns)
    programs = batch * layout.heads * tiles
    pages = cache.table.shape[1]
    resident = programs_per_multiprocessor(spec, shared_memory(query.device))
    splits = split_count(spec, programs, pages, resident * multiprocessors(query.device))
    shape = (programs, splits + 1, spec.columns)
    partial = query.new_empty(*shape, layout.value_dim, dtype=torch.float32)
    partial_lse = query.new_empty(shape, dtype=torch.float32)
    output = query.new_empty(batch, steps, query_heads, layout.value_dim)
    lse = query.new_empty(batch, query_heads, steps, dtype=torch.float32)
    logits, one_slab = site.sink_logits, len(cache.pages) == 1
    gluon_kernel(spec)[(batch * layout.heads, splits + 1, tiles)](
        query, key, value, constants.query_order, slots, history, cache.table, cache.positions,
        cache.pages[0] if one_slab else page_addresses(cache.pages), cache.sinks,
        lse if logits is None else logits,
        constants.block, constants.coefficients, constants.turns, constants.rope_scale,
        constants.key_unit, constants.gain, constants.offset, _counters(cache.table, programs),
        partial, partial_lse, output, lse,
        site.scale, site.softcap, site.window, rep, steps, pages,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], cache.table.stride(0),
        cache.positions.stride(0), slots.stride(0), layout.page_bytes,
        EXACT=exact_chunk, SINKS=layout.sink_tokens, LOGITS=logits is not None,
        ONE_SLAB=one_slab, HEADS=layout.heads,
        num_warps=spec.warps, maxnreg=register_limit(spec, resident), enable_fp_fusion=True,
    )  # fmt: skip
    return output, lse


def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shared_memory(device: torch.device) -> int:
    """Bytes that the programs of one multiprocessor share."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


def programs_per_multiprocessor(spec: GluonSpec, shared: int) -> int:
    """How many programs fit: by shared memory, and by the registers that sums and queries take."""
    by_memory = (shared - RESERVED_BYTES) // (Memory(spec).size + TRITON_BYTES + RESERVED_BYTES)
    wide = spec.groups * max(spec.key_groups, spec.value_groups)
    return max(1, min(by_memory, 3 if wide <= 4 else 2))


def register_limit(spec: GluonSpec, resident: int) -> int:
    """Registers a thread may have so that that many programs are resident."""
    return min(255, 65536 // (32 * spec.warps * resident) // 8 * 8)


def split_count(spec: GluonSpec, programs: int, pages: int, resident: int) -> int:
    """Shares of the history: two pages a warp at least (one, up to 64 of them), and whole waves.

    ``resident`` programs run at a time. One wave is best where it can be had. With more sequences
    and heads than that, further programs come when others end; warps draw pages, so that these
    help where work is left.
    """
    most = max(1, -(-pages // (2 * spec.warps)), min(16, -(-pages // spec.warps)))
    if 2 * programs <= resident:
        return min(most, resident // programs)
    shares = range(1, min(most, 8) + 1)
    return max(shares, key=lambda s: (_filled(programs * s, resident) > 0.9, -s))


def _filled(programs: int, resident: int) -> float:
    """Share of the slots that programs take in their waves."""
    return programs / (-(-programs // resident) * resident)


_CONSTANTS: Remembered[dict[tuple[int, int], GluonConstants]] = Remembered()
_COUNTERS: Remembered[dict[int, Tensor]] = Remembered()


def _constants(
    layout: PageLayout, tables: list[Tensor], geometry: list[Tensor], columns: int
) -> GluonConstants:
    """A layer's constants, made once for its tables and every use of columns."""
    known = _CONSTANTS.get([*tables, *geometry], dict, layout)
    use = series_terms(columns), column_groups(columns)
    if use not in known:
        known[use] = gluon_constants(layout, tables, geometry, columns)
    return known[use]


def _counters(table: Tensor, programs: int) -> Tensor:
    """Zeroed counters of a cache, which its launches leave zeroed.

    They belong to the block table: launches on one cache follow each other, those on two caches
    may overlap. Counters for other numbers of programs stay: a captured graph may point at them.
    """
    sizes = _COUNTERS.get([table], dict)
    if programs not in sizes:
        size = programs * COUNTER_WORDS + 1024
        sizes[programs] = torch.zeros(size, dtype=torch.int32, device=table.device)
    return sizes[programs]
