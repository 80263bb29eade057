"""``kvquant::append`` on a device: quantise in torch, then set the bits in one launch.

The quantiser is :mod:`kvquant_compile.codec` itself, so token scales and error feedback are what
they are on a CPU. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.codec.keys import quantise_keys
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import PAGE_TOKENS, LayerTables
from kvquant_compile.codec.values import quantise_values
from kvquant_compile.lowering.constants import reorder
from kvquant_compile.lowering.triton.compat import launch_options
from kvquant_compile.lowering.triton.emit import CodeWords
from kvquant_compile.lowering.triton.prepared import page_addresses
from kvquant_compile.lowering.triton.spec import KernelSpec
from kvquant_compile.lowering.triton.store_kernel import store_kernel


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

    Bytes of slots that hold no token are left as they are.
    """
    layout = PageLayout.parse(format)
    constants = LayerTables(*tables)
    key = reorder(key, geometry[0]).contiguous()
    value = value.contiguous()
    keys = quantise_keys(key, constants, layout.spec)
    values = quantise_values(value, constants, layout.spec)
    batch, heads, steps, _ = key.shape
    start, count, inverse = _places(slots)
    touched = (steps + PAGE_TOKENS - 2) // PAGE_TOKENS + 1
    scale = values.scale if keys.token_scale is None else keys.token_scale
    store_kernel[(batch * heads, 4 * touched)](
        keys.codes, keys.slot_index, keys.slot_residual, scale.contiguous(), values.codes,
        values.scale.contiguous(), values.zero.contiguous(), values.slot_index,
        values.slot_residual, key, value, sinks, start, count, inverse, table,
        page_addresses(pages), heads, steps, table.shape[1], table.stride(0), layout.page_bytes,
        key.shape[-1], value.shape[-1], **_layout_options(layout, sinks.shape[2]),
        **launch_options(num_warps=1),
    )  # fmt: skip


def _places(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First slot and number of the real tokens [B], and the step of each of them [B, S]."""
    steps = slots.shape[1]
    real = slots >= 0
    if steps == 1:
        return slots[:, 0].contiguous(), real[:, 0].int(), torch.zeros_like(slots)
    far = slots.new_full((), 2**30)
    start = torch.where(real, slots, far).amin(1)
    rank = torch.where(real, slots - start[:, None], steps).long()
    step = torch.arange(steps, dtype=torch.int32, device=slots.device).expand_as(slots)
    inverse = slots.new_zeros(slots.shape[0], steps + 1, dtype=torch.int32)
    inverse.scatter_(1, rank, step)
    return start, real.sum(1, dtype=torch.int32), inverse[:, :steps].contiguous()


def _layout_options(layout: PageLayout, sinks: int) -> dict[str, int | bool]:
    """The store kernel's compile-time arguments."""
    spec, at = layout.spec, {name: span[0] for name, span in layout.offsets.items()}
    shape = KernelSpec(layout, 0, 8, False, False, False)
    keys = CodeWords("k", at["key_codes"], spec.key_bits, shape.pairs // 4)
    values = CodeWords("v", at["value_codes"], spec.value_bits, shape.value_channels // 8)
    out: dict[str, int | bool] = {
        "PAIRS": shape.pairs,
        "VALUE_DIM": layout.value_dim,
        "VALUE_CHANNELS": shape.value_channels,
        "KEY_SLOTS": spec.key_slots,
        "VALUE_SLOTS": spec.value_slots,
        "TOKEN_SCALE": spec.key_token_scale,
        "KEY_CODES": at["key_codes"],
        "KEY_INDEX": at["key_slot_index"],
        "KEY_RESIDUAL": at["key_slot_residual"],
        "KEY_SCALE": at["key_token_scale"],
        "VALUE_CODES": at["value_codes"],
        "VALUE_SCALE": at["value_scale_zero"],
        "VALUE_INDEX": at["value_slot_index"],
        "VALUE_RESIDUAL": at["value_slot_residual"],
        "SINKS": sinks,
        "WIDTH_POW2": 1 << (max(2 * shape.pairs, layout.value_dim) - 1).bit_length(),
    }
    for name, words in (("KEY", keys), ("VALUE", values)):
        groups = words.sections * words.per_lane // words.bits
        out |= {
            f"{name}_BITS": words.bits,
            f"{name}_SELECTORS": words.selectors,
            f"{name}_PER_LANE": words.per_lane,
            f"{name}_VECTOR": words.width,
            f"{name}_APART": words.sections == 2,
            f"{name}_GROUPS": groups,
            f"{name}_GROUPS_POW2": 1 << (groups - 1).bit_length(),
        }
    return out
