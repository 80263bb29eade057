"""Parts of an attention: each an output with its log-sum-exp, by one kernel or torch's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import next_power_of_2

from kvquant_compile.lowering.attend import Site
from kvquant_compile.lowering.triton.compat import launch_options, native
from kvquant_compile.lowering.triton.flash_kernels import combine_kernel, flash_kernel


@dataclass(frozen=True, eq=False)
class Part:
    """Attention over some of the keys.

    Attributes:
        output: [B, Hq, S, value_dim], channels contiguous.
        lse: natural log-sum-exp of the scores, float32 [B, Hq, S], contiguous.
    """

    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Tiling:
    """Queries and keys of a tile of the flash kernel, warps, and software pipeline stages.

    Keys are a power of two up to a page: behind the last page there may be anything.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def tiling(key_dim: int, value_dim: int, itemsize: int) -> Tiling:
    """Tile sizes whose operands fit the 99 KB of shared memory that every GPU since 2020 has."""
    width = max(next_power_of_2(key_dim), next_power_of_2(value_dim)) * itemsize
    if width <= 256:
        return Tiling(128, 64, 8, 2)
    if width <= 512:
        return Tiling(64, 32, 4, 2 if itemsize == 2 else 1)
    return Tiling(32, 16, 4, 1)


def flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    places: Tensor,
    limit: Tensor,
    site: Site,
    first: int | None,
    dense: bool = False,
    tiles: Tiling | None = None,
) -> Part:
    """Attention where a query at slot s sees the keys at places 0 .. s, or its window of them.

    Args:
        query: [B, Hq, S, key_dim].
        keys, values: [B, H, N, ...] in the query's dtype.
        slots: int32 [B, S] of the queries, -1 for padding.
        places: int32 [B, N], slots of the keys, -1 for keys that nobody sees.
        limit: int32 [B]: tokens stored before the step if the keys are the step's own, else the
            end of the slots that can be seen.
        site: scale (above 0), soft-cap and window.
        first: slot of the first key of a block of the history; None if the keys are the step's.
        dense: no token of the step is padding and no stored one is hidden, so that keys lie at
            consecutive places; tiles that all queries see are then not masked.
        tiles: tile sizes to try instead of :func:`tiling`'s.
    """
    batch, query_heads, steps, dim = query.shape
    _, heads, count, value_dim = values.shape
    tiles = tiles or tiling(dim, value_dim, query.element_size())
    output = query.new_empty(batch, steps, query_heads, value_dim)
    lse = query.new_empty(batch, query_heads, steps, dtype=torch.float32)
    flash_kernel[(-(-steps // tiles.queries), batch * query_heads)](
        query, keys, values, slots, places, limit, output, lse,
        site.scale, site.softcap, site.window, heads, query_heads // heads, steps, count,
        first or 0, *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        slots.stride(0), places.stride(0),
        DIM=dim, DIM_POW2=max(16, next_power_of_2(dim)), VALUE_DIM=value_dim,
        VALUE_POW2=max(16, next_power_of_2(value_dim)), OWN=first is None, DENSE=dense,
        CAP=site.softcap != 0, WINDOW=site.window != 0,
        PRECISION="tf32x3" if native() else "ieee",  # of float32 operands, others have their own
        BLOCK_Q=tiles.queries, BLOCK_K=tiles.keys,
        **launch_options(num_warps=tiles.warps, num_stages=tiles.stages),
    )  # fmt: skip
    return Part(output.transpose(1, 2), lse)


def merged(a: Part, b: Part) -> Part:
    """Attention over the keys of both; a float32 output of ``a`` is overwritten."""
    output = a.output
    if output.dtype != torch.float32:
        output = torch.empty_like(output, dtype=torch.float32, memory_format=torch.preserve_format)
    return _combine(a, b, None, output)


def finished(a: Part, b: Part | None, logits: Tensor | None, dtype: torch.dtype) -> Part:
    """Attention over the keys of both and learned sink logits [Hq], the output [B, S, Hq, D] in
    ``dtype`` and contiguous."""
    if b is None and logits is None:
        return Part(a.output.transpose(1, 2).to(dtype).contiguous(), a.lse)
    batch, heads, steps, dim = a.output.shape
    output = a.output.new_empty(batch, steps, heads, dim, dtype=dtype)
    done = _combine(a, b, logits, output.transpose(1, 2))
    return Part(output, done.lse)


def _combine(a: Part, b: Part | None, logits: Tensor | None, output: Tensor) -> Part:
    batch, heads, steps, dim = output.shape
    lse = torch.empty_like(a.lse)
    other = b or a
    block = max(1, 4096 // next_power_of_2(dim))
    combine_kernel[(-(-steps // block), batch * heads)](
        a.output, a.lse, other.output, other.lse, lse if logits is None else logits, output, lse,
        heads, steps, *a.output.stride()[:3], *other.output.stride()[:3], *output.stride()[:3],
        DIM=dim, DIM_POW2=next_power_of_2(dim), BOTH=b is not None, LOGITS=logits is not None,
        BLOCK=block, **launch_options(num_warps=4),
    )  # fmt: skip
    return Part(output, lse)
