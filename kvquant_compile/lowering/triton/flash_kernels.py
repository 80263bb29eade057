"""Attention of many queries to plain keys and values, and the merge of two results."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(1 << 30)


@triton.jit
def _absorb_tiles(
    peak, mass, total, q, slot, keys, values, places, begin, end, base,
    unit, softcap, window, key_step, value_step,
    DIM: tl.constexpr, DIM_POW2: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_POW2: tl.constexpr,
    DENSE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys ``begin .. end - 1`` to a running softmax; all are seen unless ``MASKED``.

    The peak is that of the products or, with a soft-cap, of the scores in units of log 2.
    """
    d = tl.arange(0, DIM_POW2)[:, None]
    v = tl.arange(0, VALUE_POW2)[None, :]
    for start in range(begin, end, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        there = j < (end if MASKED else start + BLOCK_K)
        k = tl.load(
            keys + d + j.to(tl.int64)[None, :] * key_step,
            mask=there[None, :] & (d < DIM), other=0.0,
        )  # fmt: skip
        x = tl.dot(q, k, input_precision=PRECISION)
        if CAP:
            x = softcap - 2 * softcap / (tl.exp2(x * (unit / softcap * 2.885390081777927)) + 1)
            x = x * 1.4426950408889634
        if MASKED:
            if DENSE:
                place = tl.where(there, base + j, NOWHERE)
            else:
                place = tl.load(places + j, mask=there, other=-1)
                place = tl.where(place < 0, NOWHERE, place)
            seen = place[None, :] <= slot[:, None]
            if WINDOW:
                seen &= place[None, :] > slot[:, None] - window
            x = tl.where(seen, x, float("-inf"))
        grown = tl.maximum(peak, tl.max(x, 1))
        ground = tl.where(grown == float("-inf"), 0.0, grown)
        if CAP:
            p = tl.exp2(x - ground[:, None])
            decay = tl.exp2(peak - ground)
        else:  # the scale rides in a fused multiply-add
            ground *= unit
            p = tl.exp2(x * unit - ground[:, None])
            decay = tl.exp2(peak * unit - ground)
        y = tl.load(
            values + v + j.to(tl.int64)[:, None] * value_step,
            mask=there[:, None] & (v < VALUE_DIM), other=0.0,
        )  # fmt: skip
        total = tl.dot(p.to(y.dtype), y, total * decay[:, None], input_precision=PRECISION)
        mass = mass * decay + tl.sum(p, 1)
        peak = grown
    return peak, mass, total


@triton.jit
def _borders(
    slot, stored, past, window, count, first,
    OWN: tl.constexpr, WINDOW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Which keys a tile of queries sees: the place of key 0, then borders between keys, tiles
    apart but for the last: what is before ``begin`` or from ``end`` on nobody sees, and what is in
    ``whole .. border - 1`` everybody, where keys lie at consecutive places."""
    lowest = tl.min(tl.where(slot < 0, NOWHERE, slot), 0)
    highest = tl.max(slot, 0)
    if OWN:
        base = stored
        end = tl.minimum(past, count)
    else:
        base = first
        end = tl.minimum(tl.minimum(stored, highest + 1) - first, count)
    if WINDOW:
        begin = tl.maximum(lowest - window + 1 - base, 0) // BLOCK_K * BLOCK_K
        whole = tl.maximum(highest - window + 1 - base, 0) + BLOCK_K - 1
        whole = tl.maximum(tl.minimum(whole // BLOCK_K * BLOCK_K, end), begin)
    else:
        begin = 0
        whole = 0
    border = tl.maximum(tl.minimum(lowest + 1 - base, end) // BLOCK_K * BLOCK_K, whole)
    return base, begin, whole, border, end


@triton.jit
def flash_kernel(
    query, key, value, slots, places, limit, output, output_lse,
    scale, softcap, window, heads, rep, steps, count, first,
    query_batch, query_head, query_step, key_batch, key_head, key_step,
    value_batch, value_head, value_step, slot_row, place_row,
    DIM: tl.constexpr, DIM_POW2: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_POW2: tl.constexpr,
    OWN: tl.constexpr, DENSE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Flash attention where a query at slot s sees the keys at places 0 .. s, or its window.

    Grid (blocks of queries, batch * query heads). ``places`` [B, count] are the keys' slots, -1
    for a key that nobody sees; the place of key j is at most ``base + j`` and, where ``DENSE``,
    equal to it. The base is ``limit`` [B] for the step's own tokens (``OWN``) and ``first`` for a
    block of the history, whose slots end at ``limit``. Writes output [B, S, Hq, VALUE_DIM] and the
    natural log-sum-exp [B, Hq, S]; zeros and -inf where a query sees nothing.
    """
    row = (tl.program_id(1) // (heads * rep)).to(tl.int64)  # offsets may pass 2**31
    query_id = tl.program_id(1) % (heads * rep)
    head = (query_id // rep).to(tl.int64)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the longest first
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, DIM_POW2)[None, :]
    rows = query + row * query_batch + query_id * query_head + i.to(tl.int64)[:, None] * query_step
    q = tl.load(rows + d, mask=(i < steps)[:, None] & (d < DIM), other=0.0)
    slot = tl.load(slots + row * slot_row + i, mask=i < steps, other=-1)
    base, begin, whole, border, end = _borders(
        slot, tl.load(limit + row), (tile + 1) * BLOCK_Q, window, count, first, OWN, WINDOW, BLOCK_K
    )
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q, VALUE_POW2], tl.float32)
    keys = key + row * key_batch + head * key_head
    values = value + row * value_batch + head * value_head
    unit = scale if CAP else scale * 1.4426950408889634
    if DENSE:
        if WINDOW:
            peak, mass, total = _absorb_tiles(
                peak, mass, total, q, slot, keys, values, places, begin, whole, base,
                unit, softcap, window, key_step, value_step, DIM, DIM_POW2, VALUE_DIM, VALUE_POW2,
                True, CAP, True, PRECISION, BLOCK_K, True,
            )  # fmt: skip
        peak, mass, total = _absorb_tiles(
            peak, mass, total, q, slot, keys, values, places, whole, border, base,
            unit, softcap, window, key_step, value_step, DIM, DIM_POW2, VALUE_DIM, VALUE_POW2,
            True, CAP, WINDOW, PRECISION, BLOCK_K, False,
        )  # fmt: skip
        begin = border
    peak, mass, total = _absorb_tiles(
        peak, mass, total, q, slot, keys, values, places + row * place_row, begin, end,
        base, unit, softcap, window, key_step, value_step, DIM, DIM_POW2, VALUE_DIM, VALUE_POW2,
        DENSE, CAP, WINDOW, PRECISION, BLOCK_K, True,
    )  # fmt: skip
    result = total * tl.where(mass > 0, 1.0 / mass, 0.0)[:, None]
    v = tl.arange(0, VALUE_POW2)[None, :]
    at = ((row * steps + i[:, None]) * heads * rep + query_id) * VALUE_DIM + v
    inside = (i < steps)[:, None] & (v < VALUE_DIM)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)
    log2 = (peak if CAP else peak * unit) + tl.log2(mass)
    log = tl.where(mass > 0, log2 * 0.6931471805599453, float("-inf"))
    tl.store(output_lse + (row * heads * rep + query_id) * steps + i, log, mask=i < steps)


@triton.jit
def combine_kernel(
    a, a_lse, b, b_lse, sink_logits, output, output_lse, heads, steps,
    a_batch, a_head, a_step, b_batch, b_head, b_step, out_batch, out_head, out_step,
    DIM: tl.constexpr, DIM_POW2: tl.constexpr, BOTH: tl.constexpr, LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention over two disjoint sets of keys from the attention over each, and sink logits.

    Grid (blocks of queries, batch * query heads). ``output`` may be ``a``; log-sum-exps are
    natural, [B, Hq, S].
    """
    row = (tl.program_id(1) // heads).to(tl.int64)  # offsets may pass 2**31
    head = tl.program_id(1) % heads
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_POW2)[None, :]
    inside = (i < steps)[:, None] & (d < DIM)
    step = i[:, None].to(tl.int64)
    row_of = tl.program_id(1).to(tl.int64) * steps + i
    x_lse = tl.load(a_lse + row_of, mask=i < steps, other=float("-inf"))
    peak = x_lse
    if BOTH:
        y_lse = tl.load(b_lse + row_of, mask=i < steps, other=float("-inf"))
        peak = tl.maximum(peak, y_lse)
    if LOGITS:
        logit = tl.load(sink_logits + head).to(tl.float32)
        peak = tl.maximum(peak, logit)
    ground = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(x_lse - ground)
    mass = weight
    x = tl.load(a + row * a_batch + head * a_head + step * a_step + d, mask=inside, other=0.0)
    total = x.to(tl.float32) * weight[:, None]
    if BOTH:
        weight = tl.exp(y_lse - ground)
        mass += weight
        y = tl.load(b + row * b_batch + head * b_head + step * b_step + d, mask=inside, other=0.0)
        total += y.to(tl.float32) * weight[:, None]
    if LOGITS:
        mass += tl.exp(logit - ground)
    result = total * tl.where(mass > 0, 1.0 / mass, 0.0)[:, None]
    at = output + row * out_batch + head * out_head + step * out_step + d
    tl.store(at, result.to(output.dtype.element_ty), mask=inside)
    log = tl.where(mass > 0, ground + tl.log(mass), float("-inf"))
    tl.store(output_lse + row_of, log, mask=i < steps)
