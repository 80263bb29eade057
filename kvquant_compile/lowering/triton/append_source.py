"""The generated kernel of ``kvquant::append``: one launch from a step's tokens to page bytes.

A program takes the keys or the values of one head: of one token where a step has no more, else of
the sixteen tokens of a page (eight neighbours of both its chunks) whose code words hold nothing
else, so that words are changed without atomics. Codes pass through a buffer of their own to reach
the lanes that pack them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.lowering.triton.emit import CodeWords, Source
from kvquant_compile.lowering.triton.quantise_emit import Half
from kvquant_compile.lowering.triton.quantise_keys import quantise_keys
from kvquant_compile.lowering.triton.quantise_values import quantise_values

PACKAGE = "kvquant_compile.lowering.triton"
IMPORTS = {
    "append_store": "packed, set_codes, set_slot, token_codes",
    "quantise_steps": (
        "FLOAT16_MAX, cell, clamped, code_bytes, dot_errors, error_steps, finite, first_of,"
        " from_lane, from_order_key, on_grid, opaque, order_key, ordered_pair, picked, quotient,"
        " row_sum, score_bits, spread, stage_of, to_half"
    ),
}
ARGUMENTS = (
    "key, value, sinks, starts, counts, inverse, table, addresses, scratch, order,"
    " key_channels, key_rows, key_levels, key_feedback, value_channels, value_levels,"
    " value_feedback, heads, steps, columns, table_row, page_bytes,"
    " key_batch, key_head, key_step, value_batch, value_head, value_step, FUSED: tl.constexpr,"
    " NATIVE: tl.constexpr"
)
SINGLE_STEPS = 256
"""The longest step whose tokens are quantised one by one."""


@dataclass(frozen=True)
class AppendSpec:
    """One append kernel; equal specs share one, whatever their tables.

    Attributes:
        layout: the page layout; the number of heads plays no part.
        tokens: of a program: 1 for steps of one token, else 16.
        sinks: exact leading tokens of a sequence; the last ones are the layout's ring.
        key_feedback, value_feedback: whether coding errors move later channels.
        reorder: whether keys have to be brought into pair order.
        shared: whether programs of one token share words with others of the same step.
    """

    layout: PageLayout
    tokens: int
    sinks: int
    key_feedback: bool
    value_feedback: bool
    reorder: bool
    shared: bool = False

    @property
    def name(self) -> str:
        """A readable identifier."""
        s = self.layout.spec
        flags = "".join(
            tag
            for tag, on in (
                ("_scaled", s.key_token_scale), ("_kfeed", self.key_feedback),
                ("_vfeed", self.value_feedback), ("_order", self.reorder),
                ("_shared", self.shared),
            )
            if on
        )  # fmt: skip
        return (
            f"append_k{s.key_bits}v{s.value_bits}_d{self.layout.key_dim}x{self.layout.value_dim}"
            f"_slots{s.key_slots}{s.value_slots}_sinks{self.sinks}_n{self.tokens}{flags}"
            + (f"_recent{self.layout.ring}" if self.layout.ring else "")
        )

    @property
    def key(self) -> Half:
        """What the quantiser of keys depends on."""
        s, dim = self.layout.spec, self.layout.key_dim
        return Half(
            "key",
            s.key_bits,
            padded(dim),
            dim,
            s.key_slots,
            self.key_feedback,
            self.tokens,
            self.shared,
        )

    @property
    def value(self) -> Half:
        """What the quantiser of values depends on."""
        s, dim = self.layout.spec, self.layout.value_dim
        return Half("value", s.value_bits, dim, dim, s.value_slots, self.value_feedback,
                    self.tokens, self.shared)  # fmt: skip

    @property
    def scratch_bytes(self) -> int:
        """Bytes of codes of one program; a single token's stay in registers."""
        return 0 if self.tokens == 1 else self.tokens * max(self.key.width, self.value.width)


def append_source(spec: AppendSpec) -> str:
    """The module's text; its function ``spec.name`` is the kernel.

    Grid: (groups of tokens, batch * heads, 2), the last for keys and values. With one token a
    program the first is the number of steps, ``starts`` holds the slots [B, S], and ``counts`` and
    ``inverse`` play no part.
    """
    out = Source()
    out("import triton", "import triton.language as tl", "")
    out(*(f"from {PACKAGE}.{module} import {names}" for module, names in IMPORTS.items()))
    exact = spec.sinks + spec.layout.ring > 0
    if spec.layout.ring:
        out(f"from {PACKAGE}.ring import exact_base, exact_line, ring_state")
    out("", "")
    quantise_keys(out, spec.key, spec.layout.spec.key_token_scale, spec.reorder, exact)
    quantise_values(out, spec.value, exact)
    out("@triton.jit")
    with out.block(f"def {spec.name}({ARGUMENTS}):"):
        _places(out, spec)
        if spec.layout.ring:
            _hold(out, spec)
        if spec.tokens == 1:
            _both(out, spec)
        else:
            with out.block("if used:"):
                _both(out, spec)
    return out.text()


def _both(out: Source, spec: AppendSpec) -> None:
    """Keys in one half of the programs, values in the other."""
    _page(out, spec)
    with out.block("if tl.program_id(2) == 0:"):
        _half(out, spec, spec.key, "order, key_channels, key_rows, key_levels")
    with out.block("else:"):
        _half(out, spec, spec.value, "value_channels, value_levels")


def _places(out: Source, spec: AppendSpec) -> None:
    """Page, part of a page, and the new tokens' first place in the page and number."""
    out("line = tl.program_id(1)", "row, head = line // heads, line % heads")
    if spec.tokens == 1:
        out("slot = tl.load(starts + row * steps + tl.program_id(0))")
        out("page, first = slot // 64, slot % 64")
        return
    out("start, count = tl.load(starts + row), tl.load(counts + row)")
    out("page = start // 64 + tl.program_id(0) // 4", "part = tl.program_id(0) % 4")
    out("first = start - 64 * page", "used = (count > 0) & (64 * page < start + count)")


def _rows(spec: AppendSpec) -> str:
    """Arguments that say where exact tokens lie."""
    return f"{spec.sinks}, {spec.layout.ring}, {spec.key.dim + spec.value.dim}"


def _hold(out: Source, spec: AppendSpec) -> None:
    """``past``, the slot after a row's last new token; one program of a row says what its ring then
    holds, by the rule of :func:`kvquant_compile.lowering.recent.keep_exact`."""
    if spec.shared:
        out(f"every = tl.arange(0, {SINGLE_STEPS})")
        out("new = tl.load(starts + row * steps + every, mask=every < steps, other=-1)")
        out("past = tl.max(new, 0) + 1", "oldest = tl.min(tl.where(new < 0, past, new), 0)")
    elif spec.tokens == 1:
        out("past, oldest = slot + 1, slot")
    else:
        out("past, oldest = start + count, start")
        out("past = tl.where(count > 0, past, 0)")
    one = "(tl.program_id(0) == 0) & (tl.program_id(2) == 0) & (head == 0) & (past > 0)"
    with out.block(f"if {one}:"):
        out(
            f"held = ring_state(sinks, row, heads, {_rows(spec)})",
            "low = tl.minimum(tl.load(held), oldest)",
            f"tl.store(held, tl.maximum(low, past - {spec.layout.ring}))",
            "tl.store(held + 1, past)",
        )


def _page(out: Source, spec: AppendSpec) -> None:
    """The page's address, and ``token``, ``step``, ``live`` and ``exact`` of the rows [T, 1]."""
    out("table_at = table + row * table_row + tl.minimum(page, columns - 1)")
    out("head_bytes = head.to(tl.int64) * page_bytes")
    out(f"i = tl.arange(0, {spec.tokens})[:, None]")
    if spec.tokens == 1:
        out("token, step, live = i + first, i + tl.program_id(0), i + slot >= 0")
    else:
        out("address = tl.load(addresses + tl.load(table_at)) + head_bytes")
        out("token = i // 8 * 32 + 8 * part + i % 8", "rank = token - first")
        out("live = (rank >= 0) & (rank < count)")
        out("step = tl.load(inverse + row * steps + rank, mask=live, other=0)")
    if ring := spec.layout.ring:
        width = spec.key.dim + spec.value.dim
        out("slots = 64 * page + token")
        out(f"exact = live & ((slots < {spec.sinks}) | (slots >= past - {ring}))")
        out(f"exact_at = exact_line(slots, {spec.sinks}, {ring}).to(tl.int64) * {width}")
        out(f"sink_row = exact_base(sinks, line, {_rows(spec)}) + exact_at")
    elif spec.sinks:
        width = spec.key.dim + spec.value.dim
        out(f"exact = live & (64 * page + token < {spec.sinks})")
        out(f"sink_row = sinks + (line.to(tl.int64) * {spec.sinks} + 64 * page + token) * {width}")
    else:
        out("exact, sink_row = live, sinks")
    if spec.tokens == 1:
        return
    out("lane = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + line")
    out("program = lane * tl.num_programs(0) + tl.program_id(0)")
    out(f"codes = scratch + program * {spec.scratch_bytes}")


def _half(out: Source, spec: AppendSpec, half: Half, constants: str) -> None:
    """Quantise the program's keys or values, then pack their codes."""
    name, at = half.name, {n: span[0] for n, span in spec.layout.offsets.items()}
    line = f"row.to(tl.int64) * {name}_batch + head.to(tl.int64) * {name}_head"
    out(f"at = {name} + {line} + step.to(tl.int64) * {name}_step")
    out(f"sink_at = sink_row + {0 if name == 'key' else spec.key.dim}")
    scale = at["key_token_scale" if name == "key" else "value_scale_zero"]
    where = f"codes + i * {half.width}, address, token"
    if spec.tokens == 1:
        where = f"slot, table_at, addresses, head_bytes, token, {at[f'{name}_codes'] // 4}"
    out(f"quantise_{name}s(at, sink_at, live, exact, head, {constants}, {name}_feedback,"
        f" {where}, {at[f'{name}_slot_index']}, {at[f'{name}_slot_residual']}, {scale}, FUSED,"
        " NATIVE)")  # fmt: skip
    if spec.tokens == 1:
        return
    out("tl.debug_barrier()")
    words = CodeWords(name, at[f"{name}_codes"], half.bits, padded(half.dim) // 8)
    groups = words.sections * words.per_lane // words.bits
    options = (
        name == "key", words.bits, words.selectors, words.per_lane, words.width,
        words.sections == 2, groups, 1 << (groups - 1).bit_length(), spec.tokens, half.width,
    )  # fmt: skip
    base = f"address.to(tl.pointer_type(tl.int32)) + {words.offset // 4}"
    out(f"set_codes({base}, codes, first, count, part, {', '.join(map(str, options))})")
