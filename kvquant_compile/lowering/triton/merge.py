"""Kernels outside the pages: the step's own tokens, and the merge of all parts."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvquant_compile.lowering.triton.ring import exact_base, exact_line, ring_state
from kvquant_compile.lowering.triton.words import circle


@triton.jit
def _capped(x, softcap, CAP: tl.constexpr):
    """Scores with the soft-cap, in units of log 2."""
    if CAP:
        x = softcap - 2 * softcap / (tl.exp2(x / softcap * 2.885390081777927) + 1)
    return x * 1.4426950408889634


@triton.jit
def _absorb(peak, mass, total, x, values):
    """Add tokens: scores ``x`` [n] in units of log 2 and values [n, V] to a running softmax."""
    grown = tl.maximum(peak, tl.max(x, 0))
    ground = tl.where(grown == float("-inf"), 0.0, grown)
    weight = tl.exp2(x - ground)
    decay = tl.exp2(peak - ground)
    total = total * decay[:, None] + tl.sum(values * weight[:, None], 0)[None, :]
    return grown, mass * decay + tl.sum(weight, 0), total


@triton.jit
def _stored_scores(
    rows, base, line, there, place, pair, query_order, turns, rope_scale,
    DIM: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
    ORDER: tl.constexpr, ROPE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Products of one query with the exact tokens in rows ``line``, rotated to their places."""
    known = pair < PAIRS
    inside = there[:, None] & known[None, :]
    at = base + line[:, None] * WIDTH + pair[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + PAIRS, mask=inside, other=0.0).to(tl.float32)
    ca, cb = pair, pair + PAIRS
    if ORDER:
        ca = tl.load(query_order + ca, mask=known, other=DIM)
        cb = tl.load(query_order + cb, mask=known, other=DIM)
    qa = tl.load(rows + ca, mask=known & (ca < DIM), other=0.0).to(tl.float32)
    qb = tl.load(rows + cb, mask=known & (cb < DIM), other=0.0).to(tl.float32)
    if ROPE:
        turn = tl.load(turns + pair, mask=known, other=0)
        stretch = tl.load(rope_scale + pair, mask=known, other=1.0)
        angle = ((place.to(tl.int64)[:, None] * turn[None, :]) >> 32).to(tl.int32)
        cos, sin = circle(angle, NATIVE)
        cos, sin = cos * stretch[None, :], sin * stretch[None, :]
        a, b = a * cos - b * sin, a * sin + b * cos
    return tl.sum(a * qa[None, :] + b * qb[None, :], 1)


@triton.jit
def _absorb_ring(
    peak, mass, total, rows, base, positions, slot, oldest, stored, query_order, turns, rope_scale,
    scale, softcap, window,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_POW2: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_POW2: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, ORDER: tl.constexpr, ROPE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Add the exact tokens ``oldest .. stored - 1`` of the ring, sixteen at a time."""
    width: tl.constexpr = 2 * PAIRS + VALUE_DIM
    pair, v = tl.arange(0, PAIRS_POW2), tl.arange(0, VALUE_POW2)
    for begin in range(oldest, stored, 16):
        n = begin + tl.arange(0, 16)
        seen = (n < stored) & (n <= slot)
        if WINDOW:
            seen &= n > slot - window
        line = exact_line(n, SINKS, RING)
        place = tl.load(positions + n, mask=seen, other=-1)
        x = _stored_scores(
            rows, base, line, seen, place, pair, query_order, turns, rope_scale, DIM, PAIRS, width,
            ORDER, ROPE, NATIVE,
        )  # fmt: skip
        x = tl.where(seen & (place >= 0), _capped(x * scale, softcap, CAP), float("-inf"))
        values = base + line[:, None] * width + 2 * PAIRS + v[None, :]
        inside = seen[:, None] & (v < VALUE_DIM)[None, :]
        values = tl.load(values, mask=inside, other=0.0).to(tl.float32)
        peak, mass, total = _absorb(peak, mass, total, x, values)
    return peak, mass, total


@triton.jit
def _absorb_parts(
    peak, mass, total, partial, partial_lse, first, stride, splits,
    VALUE_DIM: tl.constexpr, VALUE_POW2: tl.constexpr,
):  # fmt: skip
    """Add the partial results ``first + stride * split`` of the pages, sixteen at a time."""
    v = tl.arange(0, VALUE_POW2)
    for begin in range(0, splits, 16):
        part = begin + tl.arange(0, 16)
        at = first + part * stride
        lse = tl.load(partial_lse + at, mask=part < splits, other=float("-inf"))
        there = (lse > float("-inf"))[:, None] & (v < VALUE_DIM)[None, :]
        sums = tl.load(partial + at[:, None] * VALUE_DIM + v[None, :], mask=there, other=0.0)
        peak, mass, total = _absorb(peak, mass, total, lse, sums)
    return peak, mass, total


@triton.jit
def _absorb_leading(
    peak, mass, total, rows, base, positions, slot, stored, query_order, turns, rope_scale,
    scale, softcap, window,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_POW2: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_POW2: tl.constexpr, SINKS: tl.constexpr, SINKS_POW2: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, ORDER: tl.constexpr, ROPE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Add the exact leading tokens."""
    width: tl.constexpr = 2 * PAIRS + VALUE_DIM
    n, v = tl.arange(0, SINKS_POW2), tl.arange(0, VALUE_POW2)
    seen = (n < SINKS) & (n < stored) & (n <= slot)
    if WINDOW:
        seen &= n > slot - window
    place = tl.load(positions + n, mask=seen, other=-1)
    x = _stored_scores(
        rows, base, n, n < SINKS, place, tl.arange(0, PAIRS_POW2), query_order, turns, rope_scale,
        DIM, PAIRS, width, ORDER, ROPE, NATIVE,
    )  # fmt: skip
    x = tl.where(seen & (place >= 0), _capped(x * scale, softcap, CAP), float("-inf"))
    values = base + n[:, None] * width + 2 * PAIRS + v[None, :]
    inside = (n < SINKS)[:, None] & (v < VALUE_DIM)[None, :]
    values = tl.load(values, mask=inside, other=0.0).to(tl.float32)
    return _absorb(peak, mass, total, x, values)


@triton.jit
def _absorb_own(
    peak, mass, total, rows, keys, values, slots, slot, step, steps, key_step, value_step,
    scale, softcap, window,
    DIM: tl.constexpr, DIM_POW2: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_POW2: tl.constexpr,
    OWN: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Add the step's own tokens up to the query's."""
    n, d, v = tl.arange(0, OWN), tl.arange(0, DIM_POW2), tl.arange(0, VALUE_POW2)
    there = (n < steps)[:, None]
    q = tl.load(rows + d, mask=d < DIM, other=0.0).to(tl.float32)
    keys += n[:, None] * key_step + d[None, :]
    keys = tl.load(keys, mask=there & (d < DIM)[None, :], other=0.0).to(tl.float32)
    place = tl.load(slots + n, mask=n < steps, other=-1)
    seen = (n <= step) & (place >= 0) & (slot >= 0)
    if WINDOW:
        seen &= place > slot - window
    x = _capped(tl.sum(keys * q[None, :], 1) * scale, softcap, CAP)
    values += n[:, None] * value_step + v[None, :]
    values = tl.load(values, mask=there & (v < VALUE_DIM)[None, :], other=0.0).to(tl.float32)
    x = tl.where(seen, x, float("-inf"))
    return _absorb(peak, mass, total, x, values)


@triton.jit
def merge_kernel(
    partial, partial_lse, query, key, value, slots, positions, history, sinks, sink_logits,
    query_order, turns, rope_scale, output, output_lse,
    scale, softcap, window,
    heads, rep, steps, splits, columns, tiles,
    query_batch, query_head, query_step, key_batch, key_head, key_step,
    value_batch, value_head, value_step, slot_row, position_row,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIM_POW2: tl.constexpr, VALUE_POW2: tl.constexpr,
    PAIRS: tl.constexpr, PAIRS_POW2: tl.constexpr, SINKS: tl.constexpr, SINKS_POW2: tl.constexpr,
    RING: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, LOGITS: tl.constexpr, ORDER: tl.constexpr, ROPE: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """One query: partial sums of the pages, exact leading and last tokens, the step's own.

    Grid (batch * query heads, steps). Writes output [B, S, Hq, VALUE_DIM] and the natural
    log-sum-exp [B, Hq, S]; zeros and -inf where nothing is seen.
    """
    query_heads = heads * rep
    row = tl.program_id(0) // query_heads
    query_id = tl.program_id(0) % query_heads
    head = query_id // rep
    step = tl.program_id(1)
    slots += row * slot_row
    positions += row * position_row
    slot = tl.load(slots + step)
    rows = query + row * query_batch + query_id * query_head + step * query_step
    peak = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    total = tl.zeros([1, VALUE_POW2], tl.float32)

    column = (query_id % rep) * steps + step
    tile = (row * heads + head) * tiles + column // columns
    peak, mass, total = _absorb_parts(
        peak, mass, total, partial, partial_lse, tile * splits * columns + column % columns,
        columns, splits, VALUE_DIM, VALUE_POW2,
    )  # fmt: skip
    width: tl.constexpr = 2 * PAIRS + VALUE_DIM
    base = exact_base(sinks, row * heads + head, SINKS, RING, width)
    if SINKS > 0:
        stored = tl.load(history + row)
        if not EXACT:
            stored = tl.maximum(stored, slot + 1)
        peak, mass, total = _absorb_leading(
            peak, mass, total, rows, base, positions, slot, stored, query_order, turns, rope_scale,
            scale, softcap, window, DIM, VALUE_DIM, VALUE_POW2, PAIRS, PAIRS_POW2, SINKS,
            SINKS_POW2, CAP, WINDOW, ORDER, ROPE, NATIVE,
        )  # fmt: skip
    if RING > 0:
        oldest = tl.maximum(tl.load(ring_state(sinks, row, heads, SINKS, RING, width)), SINKS)
        peak, mass, total = _absorb_ring(
            peak, mass, total, rows, base, positions, slot, oldest, tl.load(history + row),
            query_order, turns, rope_scale, scale, softcap, window, DIM, VALUE_DIM, VALUE_POW2,
            PAIRS, PAIRS_POW2, SINKS, RING, CAP, WINDOW, ORDER, ROPE, NATIVE,
        )  # fmt: skip
    if OWN > 0:
        keys = key + row * key_batch + head * key_head
        values = value + row * value_batch + head * value_head
        peak, mass, total = _absorb_own(
            peak, mass, total, rows, keys, values, slots, slot, step, steps, key_step, value_step,
            scale, softcap, window, DIM, DIM_POW2, VALUE_DIM, VALUE_POW2, OWN, CAP, WINDOW,
        )  # fmt: skip

    at = (row * query_heads + query_id) * steps + step
    one, v = tl.arange(0, 1), tl.arange(0, VALUE_POW2)
    if LOGITS:
        logit = tl.load(sink_logits + query_id + one).to(tl.float32) * 1.4426950408889634
        peak, mass, total = _absorb(peak, mass, total, logit, total * 0.0)
    result = total * tl.where(mass > 0, 1.0 / mass, 0.0)[:, None]
    target = ((row * steps + step) * query_heads + query_id).to(tl.int64) * VALUE_DIM
    wide = (v < VALUE_DIM)[None, :]
    tl.store(output + target + v[None, :], result.to(output.dtype.element_ty), mask=wide)
    log = tl.where(mass > 0, (peak + tl.log2(mass)) * 0.6931471805599453, float("-inf"))
    tl.store(output_lse + at + one, log)
