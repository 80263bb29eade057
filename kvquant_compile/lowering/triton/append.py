"""``kvquant::append`` on a device: one launch that quantises and packs a step's tokens.

Short steps need no other work: every token has programs of its own. Longer ones first find the
step of every place, in a few launches over the slots alone. Nothing waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.triton.append_constants import append_constants
from kvquant_compile.lowering.triton.append_source import (
    SINGLE_STEPS,
    AppendSpec,
    append_source,
)
from kvquant_compile.lowering.triton.compat import interpreting, launch_options, native
from kvquant_compile.lowering.triton.module import load
from kvquant_compile.lowering.triton.prepared import page_addresses

GROUP_TOKENS = 16
WARPS = {1: 1, GROUP_TOKENS: 4}


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
    """As :func:`kvquant_compile.lowering.append.append`, without host synchronisation.

    The slots of a sequence's real tokens are consecutive numbers, in any order. Bytes of slots
    that hold no token are left as they are.
    """
    layout = PageLayout.parse(format)
    constants, order = append_constants(tables), geometry[0]
    batch, heads, steps, _ = key.shape
    feedback = (constants.key_feedback.numel() > 0, constants.value_feedback.numel() > 0)
    tokens = 1 if steps <= SINGLE_STEPS else GROUP_TOKENS
    shared = tokens == 1 and steps > 1
    spec = AppendSpec(layout, tokens, layout.sink_tokens, *feedback, order.numel() > 0, shared)
    groups = steps if tokens == 1 else 4 * ((steps + PAGE_TOKENS - 2) // PAGE_TOKENS + 1)
    grid = (groups, batch * heads, 2)
    scratch = torch.empty(
        2 * groups * batch * heads * spec.scratch_bytes, dtype=torch.uint8, device=key.device
    )
    moves = (
        (constants.key_feedback_words, constants.value_feedback_words)
        if tokens == 1
        else (constants.key_feedback, constants.value_feedback)
    )
    key, value = _channels_last(key), _channels_last(value)
    append_kernel(spec)[grid](
        key, value, sinks, *_places(slots, tokens), table, page_addresses(pages), scratch, order,
        constants.key_channels, constants.key_rows, constants.key_levels, moves[0],
        constants.value_channels, constants.value_levels, moves[1],
        heads, steps, table.shape[1], table.stride(0), layout.page_bytes,
        *key.stride()[:3], *value.stride()[:3], not interpreting(), native(),
        **options(tokens),
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def append_kernel(spec: AppendSpec) -> Any:
    """The jitted kernel of a spec, compiled by Triton at its first launch."""
    return load(append_source(spec), spec.name)


def options(tokens: int) -> dict[str, Any]:
    """Compiler options of a launch. A fused multiply-add would round differently from torch."""
    return launch_options(num_warps=WARPS[tokens], num_stages=1, enable_fp_fusion=False)


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _places(slots: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """First slot and number of the real tokens [B], and the step of each of them [B, S]; for
    programs of one token the slots."""
    steps = slots.shape[1]
    if tokens == 1:
        flat = slots.contiguous()
        return flat, flat, flat
    real = slots >= 0
    far = slots.new_full((), 2**30)
    start = torch.where(real, slots, far).amin(1)
    rank = torch.where(real, slots - start[:, None], steps).long()
    step = torch.arange(steps, dtype=torch.int32, device=slots.device).expand_as(slots)
    inverse = slots.new_zeros(slots.shape[0], steps + 1, dtype=torch.int32)
    inverse.scatter_(1, rank, step)
    return start, real.sum(1, dtype=torch.int32), inverse[:, :steps].contiguous()
