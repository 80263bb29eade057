"""Device functions that find the exact tokens beside the pages.

Their rows are those of :mod:`kvquant_compile.lowering.recent`: leading tokens, a ring of the last
ones, and a row that says what the ring holds.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ring_state(sinks, row, heads, SINKS: tl.constexpr, RING: tl.constexpr, WIDTH: tl.constexpr):
    """Address of two int32: the first slot that the ring of a row holds, and the one after its
    last."""
    rows: tl.constexpr = SINKS + RING + 1
    at = (row.to(tl.int64) * heads * rows + (SINKS + RING)) * WIDTH
    return (sinks + at).to(tl.pointer_type(tl.int32))


@triton.jit
def exact_line(slot, SINKS: tl.constexpr, RING: tl.constexpr):
    """The row of an exact token."""
    if RING > 0:
        return tl.where(slot < SINKS, slot, SINKS + slot % RING)
    return slot


@triton.jit
def exact_slots(
    sinks, row, heads, slot, stored, SINKS: tl.constexpr, RING: tl.constexpr, WIDTH: tl.constexpr
):
    """Which slots of a row are exact."""
    exact = slot < SINKS
    if RING > 0:
        low = tl.load(ring_state(sinks, row, heads, SINKS, RING, WIDTH))
        exact |= (slot >= low) & (slot < stored)
    return exact


@triton.jit
def exact_base(sinks, line, SINKS: tl.constexpr, RING: tl.constexpr, WIDTH: tl.constexpr):
    """Address of the exact tokens of ``line``, row times heads plus head."""
    rows: tl.constexpr = SINKS + RING + 1 if RING > 0 else SINKS
    return sinks + line.to(tl.int64) * (rows * WIDTH)
