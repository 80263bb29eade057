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

from kvquant_compile.lowering.triton.emit import CodeWords, Source
from kvquant_compile.lowering.triton.keys import KeyEmitter
from kvquant_compile.lowering.triton.spec import KernelSpec
from kvquant_compile.lowering.triton.values import ValueEmitter

_SIGNATURE = """def {name}(
    query, query_order, slots, history, table, positions, addresses,
    key_words, offset_words, key_bytes, value_bytes, turns, rope_scale, key_factor,
    gain, offset, partial, partial_lse,{ring}
    scale, softcap, window,
    heads, rep, steps, splits, query_batch, query_head, query_step, table_row, position_row,
    slot_row, page_bytes,
    EXACT: tl.constexpr, SINKS: tl.constexpr, STEPS_POW2: tl.constexpr, NATIVE: tl.constexpr,
):"""


def history_source(spec: KernelSpec) -> str:
    """Triton source of one kernel; a function named ``spec.name``."""
    out = Source()
    out(f'"""Generated: attention over {spec.layout} pages; {spec.name}."""')
    out("import triton", "import triton.language as tl", "")
    out("from kvquant_compile.lowering.triton.primitives import *  # noqa: F403")
    if spec.layout.ring:
        out("from kvquant_compile.lowering.triton.ring import ring_state")
    out("", "")
    out("@triton.jit")
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
    _write_range(out, spec)
    keys.prologue(out)
    values.prologue(out)
    out(
        "run = NO_RUN  # offset between position and slot of this pass; the first takes each page's"
    )
    out("more = 1")
    with out.block("while more > 0:"):
        out("left = tl.full([W, 64], FAR, tl.int32)")
        out("page = first + warp1", "ahead = tl.minimum(page, last)")
        _write_address(out, "upcoming")
        keys.words.load(out, "upcoming")
        _write_positions(out)
        with out.block("for start in tl.range(first, end, W, num_stages=1):"):
            _write_iteration(out, spec, keys, values)
        if spec.rotated:
            out("run = tl.min(tl.min(left, 1), 0)", "more = (run < FAR).to(tl.int32)")
        else:
            out("more = 0")
    values.epilogue(out)


def _write_range(out: Source, spec: KernelSpec) -> None:
    """Which columns and pages this program works on."""
    out(
        f"W: tl.constexpr = {spec.warps}",
        f"N: tl.constexpr = {spec.columns}",
        "FAR: tl.constexpr = 2147483647",
        "NO_RUN: tl.constexpr = -2147483648",
        "row = tl.program_id(0) // heads",
        "head = tl.program_id(0) % heads",
        "split = tl.program_id(1)",
        "tile = tl.program_id(2)",
        "lane = tl.arange(0, 32)[None, :]",
        "warp1 = tl.arange(0, W)",
        "zero2 = tl.zeros([W, 32], tl.int32)",
        "two = tl.arange(0, 2)",
        "eight = tl.arange(0, 8)",
        "flat4 = tl.arange(0, 128)",
        "flat2 = tl.arange(0, 64)",
        "flat1 = tl.arange(0, 32)",
        "g = lane // 4",
        "t = lane % 4",
        "m16 = tl.arange(0, 16)",
        "in_page = tl.arange(0, 64)",
        "column = tile * N + tl.arange(0, N)",
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
    )


def _write_address(out: Source, name: str) -> None:
    """Word pointers ``name`` [W] of the pages ``ahead``."""
    out(
        f"{name}_id = tl.load(table + row * table_row + ahead)",
        f"{name} = tl.load(addresses + {name}_id) + head * page_bytes",
        f"{name} = tl.multiple_of({name}.to(tl.pointer_type(tl.int32)), 16)",
    )


def _write_iteration(out: Source, spec: KernelSpec, keys: KeyEmitter, values: ValueEmitter) -> None:
    out("page = start + warp1", "here = upcoming")
    out("# 0, but the compiler must not know: keeps table loads inside the loop")
    out("opaque = (upcoming_id >> 31) * 1024")
    values.words.load(out, "here")
    out("ahead = tl.minimum(page + W, last)")
    _write_address(out, "upcoming")
    values.load_tokens(out)
    _write_seen(out, spec)
    _write_positions(out)
    keys.scores(out)
    keys.words.load(out, "upcoming")
    _write_softmax(out, spec)
    values.accumulate(out)


def _write_positions(out: Source) -> None:
    """``upcoming_at`` [W, 64]: positions of the tokens of the pages ``ahead``."""
    out(
        "slots_ahead = ahead[:, None] * 64 + in_page[None, :]",
        "upcoming_at = tl.load(positions + row * position_row + slots_ahead,"
        " mask=slots_ahead < limit, other=-1)",
    )


def _write_seen(out: Source, spec: KernelSpec) -> None:
    """``seen`` [W, 64]: tokens of a page, in row order, that this pass reads."""
    out(
        "slots_here = page[:, None] * 64 + in_page[None, :]",
        "live = (slots_here < limit) & (slots_here < end * 64) & (slots_here >= SINKS)",
        "at = upcoming_at",
        "seen = live & (at >= 0)",
    )
    if not spec.rotated:
        return
    out(
        "shift = tl.where(seen, at - slots_here, FAR)",
        "own = tl.min(shift, 1)",
        "done = tl.where(run == NO_RUN, NO_RUN, own)",
        "base = tl.where(run == NO_RUN, own, run)",
        "least = tl.maximum(own, base)",
        "seen = (shift == base[:, None]) & (shift > done[:, None]) & (shift < FAR)",
        "left = tl.minimum(left, tl.where(shift > least[:, None], shift, FAR))",
    )


def _write_softmax(out: Source, spec: KernelSpec) -> None:
    """Scores to ``p`` [W, 64, N], with the running maximum ``peak`` [W, N]."""
    out("", "# softmax, in units of log 2", "x = score * unit[:, None, :]")
    out("slots_there = row_order(tl.where(seen, slots_here, FAR), W)")
    if spec.softcap:
        out("x = softcap - 2 * softcap / (tl.exp2(x / softcap * 2.885390081777927) + 1)")
        out("x *= 1.4426950408889634")
    out("visible = slots_there[:, :, None] <= slot[None, None, :]")
    if spec.window:
        out("visible &= slots_there[:, :, None] > slot[None, None, :] - window")
    out(
        "x = tl.where(visible, x, float('-inf'))",
        "high = tl.max(x, 1)",
        "grown = tl.maximum(peak, high)",
        "ground = tl.where(grown == float('-inf'), 0.0, grown)",
        "decay = tl.exp2(peak - ground)",
        "peak = grown",
        "p = tl.exp2(x - ground[:, None, :])",
    )
