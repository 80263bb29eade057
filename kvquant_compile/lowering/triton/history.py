"""The source of the kernel that attends to the pages of one kv head: flash decoding.

A program works on one sequence, one kv head, one tile of query columns and one share of the
pages, ``W`` pages at a time, one a warp. Each warp keeps its own softmax state; they are merged at
the end. Codes become matrix fragments in registers, because a page holds them in fragment order;
no dequantised element ever passes through memory.

Rotation is block-relative: ``q' R(base + i) k = (R(-base) q)' (R(i) k)``. The queries are turned
back by the position of a page's first token (exactly, in 64-bit fixed point), the keys forward by
their offset in the page (a table of 64 rows). Where positions in a page are not consecutive, the
pages are read once for every offset between position and slot that occurs.
"""

from __future__ import annotations

import math

from kvquant_compile.lowering.triton.emit import CodeWords, Source
from kvquant_compile.lowering.triton.keys import KeyEmitter
from kvquant_compile.lowering.triton.queries import QueryEmitter
from kvquant_compile.lowering.triton.spec import KernelSpec
from kvquant_compile.lowering.triton.values import WEIGHT_ONE, ValueEmitter

_SIGNATURE = """def {name}(
    query, query_order, slots, history, table, positions, addresses,
    key_words, turn_words, zero_words, query_terms, key_unit, key_bytes, value_bytes,
    turns, rope_scale, gain, offset, partial, partial_lse,{ring}
    scale, softcap, window,
    heads, rep, steps, splits, query_batch, query_head, query_step, table_row, position_row,
    slot_row, page_bytes,
    EXACT: tl.constexpr, SINKS: tl.constexpr, STEPS_POW2: tl.constexpr, NATIVE: tl.constexpr,
):"""


_PLAIN = [
    "window", "heads", "rep", "steps", "splits", "query_batch", "query_head", "query_step",
    "table_row", "position_row", "slot_row",
]  # fmt: skip


def history_source(spec: KernelSpec) -> str:
    """Triton source of one kernel; a function named ``spec.name``."""
    out = Source()
    out(f'"""Generated: attention over {spec.layout} pages; {spec.name}."""')
    out("import triton", "import triton.language as tl", "")
    for module in ("levels", "operands", "tokens", "words"):
        out(f"from kvquant_compile.lowering.triton.{module} import *  # noqa: F403")
    if spec.layout.ring:
        out("from kvquant_compile.lowering.triton.ring import ring_state")
    out("", "")
    out(f"@triton.jit(do_not_specialize={_PLAIN})  # lengths would have it compiled again")
    ring = " sinks," if spec.layout.ring else ""
    for line in _SIGNATURE.format(name=spec.name, ring=ring).split("\n")[:-1]:
        out(line)
    with out.block("):"):
        _write_body(out, spec)
    return out.text()


def _write_body(out: Source, spec: KernelSpec) -> None:
    layout = spec.layout
    offsets = layout.offsets
    keys = KeyEmitter(
        spec,
        CodeWords("k", offsets["key_codes"][0], layout.spec.key_bits, spec.pairs // 4),
    )
    values = ValueEmitter(
        spec,
        CodeWords("v", offsets["value_codes"][0], layout.spec.value_bits, spec.value_channels // 8),
    )
    queries = QueryEmitter(spec)
    _write_range(out, spec)
    queries.prologue(out)
    keys.prologue(out)
    values.prologue(out)
    out(
        "run = NO_RUN  # offset between position and slot of this pass; the first takes each page's"
    )
    out("more = 1")
    with out.block("while more > 0:"):
        out("left = tl.full([W, 64], FAR, tl.int32)", "page = first + warp1")
        _write_id(out, 0)
        _write_address(out, "here")
        keys.words.load(out, "here")
        _write_positions(out, 0)
        _write_seen(out, spec, 0)
        queries.angles(out)
        _write_positions(out, 1)
        _write_id(out, 1)
        _write_address(out, "upcoming")
        _write_id(out, 2)
        with out.block("for start in tl.range(first, end, W, num_stages=1):"):
            _write_iteration(out, spec, queries, keys, values)
        if spec.rotated:
            out("run = tl.min(tl.min(left, 1), 0)", "more = (run < FAR).to(tl.int32)")
        else:
            out("more = 0")
    values.epilogue(out)


def _write_range(out: Source, spec: KernelSpec) -> None:
    """Which columns and pages this program works on."""
    out(
        f"W: tl.constexpr = {spec.warps}",
        f"Q: tl.constexpr = {spec.queries}",
        "N: tl.constexpr = 2 * Q  # columns of products",
        "FAR: tl.constexpr = 2147483647",
        "NO_RUN: tl.constexpr = -2147483648",
        "LOWEST: tl.constexpr = -1e13  # below it nothing of a page is seen",
        "row = tl.program_id(0) // heads",
        "head = tl.program_id(0) % heads",
        "split = tl.program_id(1)",
        "tile = tl.program_id(2)",
        "lane = tl.arange(0, 32)[None, :]",
        "warp1 = tl.arange(0, W)",
        "zero2 = tl.zeros([W, 32], tl.int32)",
        "two = tl.arange(0, 2)",
        "four = tl.arange(0, 4)",
        "eight = tl.arange(0, 8)",
        "flat4 = tl.arange(0, 128)",
        "flat2 = tl.arange(0, 64)",
        "flat1 = tl.arange(0, 32)",
        "g = lane // 4",
        "t = lane % 4",
        "m16 = tl.arange(0, 16)",
        "in_page = tl.arange(0, 64)",
        "column = tile * Q + tl.arange(0, Q)",
        "real = column < rep * steps",
        "slot = tl.load(slots + row * slot_row + column % steps, mask=real, other=-1)",
        "limit = tl.load(history + row)",
    )
    with out.block("if not EXACT:"):
        out(
            "every = tl.arange(0, STEPS_POW2)",
            "newest = tl.load(slots + row * slot_row + every, mask=every < steps, other=-1)",
            "limit = tl.maximum(limit, tl.max(newest, 0) + 1)",
        )
    if ring := spec.layout.ring:
        width = 2 * spec.pairs + spec.layout.value_dim
        out(
            f"held = ring_state(sinks, row, heads, SINKS, {ring}, {width})",
            "limit = tl.minimum(limit, tl.load(held))  # what the ring holds is read beside pages",
        )
    out("pages = (limit + 63) // 64", "begin = 0")
    if spec.window:
        out(
            "oldest = tl.min(tl.where(slot >= 0, slot, FAR), 0)",
            "begin = tl.minimum(tl.maximum(oldest - window + 1, 0) // 64, pages)",
        )
    out(
        "newest_slot = tl.max(slot, 0)",
        "pages = tl.minimum(pages, newest_slot // 64 + 1)",
        "share = (tl.maximum(pages - begin, 0) + splits * W - 1) // (splits * W) * W",
        "first = begin + split * share",
        "end = tl.minimum(first + share, pages)",
        "last = tl.maximum(end - 1, 0)",
        "bound = tl.minimum(limit, end * 64)",
    )


def _write_id(out: Source, ahead: int) -> None:
    """``page_id`` [W]: ids of the pages so many turns of the loop ahead of ``page``."""
    out(f"page_id = tl.load(table + row * table_row + tl.minimum(page + {ahead} * W, last))")


def _write_address(out: Source, name: str) -> None:
    """Word pointers ``name`` [W] of the pages ``page_id``."""
    out(
        f"{name} = tl.load(addresses + page_id) + head * page_bytes",
        f"{name} = tl.multiple_of({name}.to(tl.pointer_type(tl.int32)), 16)",
    )


def _write_iteration(
    out: Source, spec: KernelSpec, queries: QueryEmitter, keys: KeyEmitter, values: ValueEmitter
) -> None:
    """One page a warp.

    Loads that a page waits for are asked for early, and apart: ptxas has six barriers for them to
    arrive at, and waits for all that share one. Values come while keys are read, the next keys once
    these are scores; their addresses were loaded a turn before, their ids two. What a page's
    positions decide is known a turn ahead too.
    """
    out("page = start + warp1")
    out("# 0, but the compiler must not know: keeps table loads inside the loop")
    out("opaque = (page_id >> 31) * 1024")
    values.load(out, "here")
    values.load_slots(out)
    keys.scores(out, queries)
    out("", "# the next pages")
    out("here = upcoming")
    keys.words.load(out, "here")
    _write_address(out, "upcoming")
    _write_id(out, 3)
    _write_softmax(out, spec, WEIGHT_ONE)
    _write_seen(out, spec, 1)
    queries.angles(out)
    _write_positions(out, 2)
    values.accumulate(out)


def _write_positions(out: Source, ahead: int) -> None:
    """``upcoming_at`` [W, 64]: positions of the tokens of the pages so many turns ahead, negative
    where no query of this program reads the token from a page."""
    out(
        f"slots_ahead = (page + {ahead} * W)[:, None] * 64 + in_page[None, :]",
        "upcoming_at = tl.load(positions + row * position_row + slots_ahead,"
        " mask=(slots_ahead >= SINKS) & (slots_ahead < bound), other=-1)",
    )


def _write_seen(out: Source, spec: KernelSpec, ahead: int) -> None:
    """Of the pages so many turns ahead: ``seen_low``, ``seen_high`` [W], a bit for every token that
    this pass reads, and ``base``, its offset between positions and slots."""
    out(
        f"slots_here = (page + {ahead} * W)[:, None] * 64 + in_page[None, :]",
        "seen = upcoming_at >= 0",
    )
    if spec.rotated:
        out(
            "shift = tl.where(seen, upcoming_at - slots_here, FAR)",
            "own = tl.min(shift, 1)",
            "done = tl.where(run == NO_RUN, NO_RUN, own)",
            "base = tl.where(run == NO_RUN, own, run)",
            "seen = shift == tl.where((base > done) & (base < FAR), base, NO_RUN)[:, None]",
            "least = tl.maximum(own, base)",
            "left = tl.minimum(left, tl.where(shift > least[:, None], shift, FAR))",
        )
    # As bits: a tensor of tokens in the row order of scores would go through shared memory.
    out("seen_low, seen_high = seen_bits(seen, W).split()")


def _write_softmax(out: Source, spec: KernelSpec, bound: float) -> None:
    """Scores to ``weight`` [W, 64, Q] and the running maximum ``peak`` [W, Q].

    Weights times token scales are at most ``bound``: a weight is ``2**room`` times what it is
    relative to the page's largest, and ``growth`` takes it to the running maximum.
    """
    out("", "# softmax, in units of log 2; a bit for every token that a query sees")
    out("older = slot[None, :] - page[:, None] * 64 + 1")
    for word, count in (("low", "older"), ("high", "older - 32")):
        hidden = f" & ~first_bits({count} - window)" if spec.window else ""
        out(f"shown_{word} = seen_{word}[:, None] & first_bits({count}){hidden}")
    factor = "unit"
    if spec.softcap:
        factor = "1.4426950408889634"
        out("score *= unit[:, None, :]")
        out("score = softcap - 2 * softcap / (tl.exp2(score / softcap * 2.885390081777927) + 1)")
    out(
        "bits = tl.where((row64 < 32)[None, :, None], shown_low[:, None, :],"
        " shown_high[:, None, :])",
        "visible = ((bits >> (row_token % 32)[None, :, None]) & 1) != 0",
        "score = tl.where(visible, score, float('-inf'))",
        f"top = tl.maximum(tl.max(score, 1) * {factor}, LOWEST)",
        "widest = tl.max(lower_half(tokens_here).to(tl.float32), 1)",
        f"room = {math.log2(bound)!r} - logarithm(tl.maximum(widest, 1e-7), NATIVE)",
        "ground = top - room[:, None]",
        "grown = tl.maximum(peak, top)",
        "decay = tl.exp2(peak - grown)",
        "growth = tl.exp2(ground - grown)",
        "peak = grown",
    )
    scaled = "score * unit[:, None, :]" if not spec.softcap else f"score * {factor}"
    out(f"weight = tl.exp2({scaled} - ground[:, None, :])")
