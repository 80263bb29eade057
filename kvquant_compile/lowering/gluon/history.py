"""The source of the Gluon kernel: a decode step's attention in one launch, flash decoding.

A program works on one sequence, one kv head, one tile of query columns and, with the other
splits, on all pages; the last of them to end merges the splits. Every warp takes whole pages, on
its own, as they come: copies into shared memory, codes to matrix fragments in registers, two
kinds of products, a running softmax.
"""

from __future__ import annotations

from kvquant_compile.lowering.gluon.epilogue import EpilogueEmitter
from kvquant_compile.lowering.gluon.keys import KeyEmitter
from kvquant_compile.lowering.gluon.levels import LevelEmitter
from kvquant_compile.lowering.gluon.memory import Memory
from kvquant_compile.lowering.gluon.own import OwnEmitter
from kvquant_compile.lowering.gluon.queries import QueryEmitter
from kvquant_compile.lowering.gluon.ring import RingEmitter
from kvquant_compile.lowering.gluon.slots import KeySlotEmitter, ValueSlotEmitter
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.gluon.values import ValueEmitter
from kvquant_compile.lowering.gluon.visibility import VisibilityEmitter
from kvquant_compile.lowering.gluon.writer import KernelWriter

_HEAD = '''"""Generated: attention over {layout} pages; {name}."""
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

'''

_SIGNATURE = """
@gluon.jit(do_not_specialize=["window", "pages"])
def {name}(
    query, key, value, query_order, slots, history, table, positions, addresses, sinks,
    sink_logits, constants, coefficients, turns, rope_scale, key_unit, gain, offset, counters,
    partial, partial_lse, output, output_lse,
    scale, softcap, window, rep, steps, pages, query_batch, query_head_stride, query_step,
    key_batch, key_head, key_step, value_batch, value_head, value_step, table_row, position_row,
    slot_row, page_bytes, EXACT: gl.constexpr, SINKS: gl.constexpr, LOGITS: gl.constexpr,
    ONE_SLAB: gl.constexpr, HEADS: gl.constexpr,
):
"""


def gluon_source(spec: GluonSpec) -> str:
    """Gluon source of one kernel; a function named ``spec.name``."""
    out = KernelWriter()
    with out.block(""):
        _write_body(out, spec)
    head = _HEAD.format(layout=spec.layout, name=spec.name)
    return head + out.constants() + _SIGNATURE.format(name=spec.name) + out.text().lstrip("\n")


def _write_body(out: KernelWriter, spec: GluonSpec) -> None:
    memory = Memory(spec)
    ring, visibility = RingEmitter(spec, memory), VisibilityEmitter(spec, memory)
    queries, epilogue = QueryEmitter(spec, memory), EpilogueEmitter(spec, memory)
    _write_frame(out, spec, memory)
    ring.copies.prologue(out)
    visibility.load(out)
    if not spec.window:
        ring.start(out)
    queries.load(out)
    visibility.prologue(out)
    if spec.window:
        ring.start(out)
    ring.prologue(out)
    OwnEmitter(spec).write(out)
    with out.block("if split >= 0:"):
        _write_pages(out, spec, memory, ring, visibility, queries)
        epilogue.merge_warps(out)
    epilogue.merge_splits(out)


def _write_pages(
    out: KernelWriter,
    spec: GluonSpec,
    memory: Memory,
    ring: RingEmitter,
    visibility: VisibilityEmitter,
    queries: QueryEmitter,
) -> None:
    """What a warp needs for its pages, and the loop over them."""
    keys, levels = KeyEmitter(spec, memory), LevelEmitter(spec, memory)
    key_slots, value_slots = KeySlotEmitter(spec, memory), ValueSlotEmitter(spec, memory)
    values, copies = ValueEmitter(spec, memory, value_slots), ring.copies
    queries.prologue(out)
    key_slots.prologue(out)
    copies.ready(out)
    keys.prologue(out)
    levels.prologue(out)
    values.prologue(out)
    if not spec.rotates:
        levels.page(out)
    out("")
    with out.block("while turn < units:"):
        copies.wait(out, "keys")
        visibility.page(out)
        if spec.rotates:
            queries.page(out)
            levels.page(out)
        ring.advance(out)
        ring.find(out, "upcoming")
        keys.scores(out, 0)
        key_slots.add(out, 0)
        ring.locate(out)
        keys.scores(out, 1)
        key_slots.add(out, 1)
        copies.start(out, "keys", "(upcoming < units) & (again == 0)")
        copies.wait(out, "values")
        values.load_tokens(out)
        visibility.mask(out)
        values.softmax(out)
        values.accumulate(out, 0)
        ring.draw(out, "1 - again")
        values.accumulate(out, 1)
        copies.start(out, "values", "(upcoming < units) & (again == 0)")
        values.finish(out)
        out("turn = gl.where(again != 0, turn, upcoming)")
        if spec.bulk:
            out("phase = gl.where(again != 0, phase, phase ^ 1)")
    if value_slots.count:
        value_slots.flush(out)


def _write_frame(out: KernelWriter, spec: GluonSpec, memory: Memory) -> None:
    threads = 32 * spec.warps
    rows = -(-memory.size // (4 * threads))  # and one more, of which only Triton knows
    out(
        f"LANES: gl.constexpr = gl.BlockedLayout([1], [32], [{spec.warps}], [0])",
        "FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])",
        f"shared_memory = gl.allocate_shared_memory(gl.int32, [{rows + 1}, {threads}], FLAT)",
        f"tid = gl.arange(0, {threads}, layout=LANES)",
        f"own_row = shared_memory.index({rows})",
        "own_row.store(tid)",
        "lane = tid & 31", "g = lane >> 2", "t = lane & 3", "lz = tid * 0",
        "zero = lz.to(gl.float32)",
        "middle = (g * 4).to(gl.float32) * 0.03125 - 1.0",
        "heads: gl.constexpr = HEADS",
        "row = gl.program_id(0) // heads", "head = gl.program_id(0) % heads",
        "split = gl.program_id(1) - 1", "splits = gl.num_programs(1) - 1",
        "tile = gl.program_id(2)", "tiles = gl.num_programs(2)",
    )  # fmt: skip
    out.ptx("mov.u32 $0, global_smem;", ["shared"], ["split"], name="SHARED")
    text = ".reg .b32 x; mov.u32 x, %tid.x; shr.u32 x, x, 5; shfl.sync.idx.b32 $0, x, 0, 31, -1;"
    out.ptx(text, ["warp"], ["split"], name="WARP")
    out(f"here = shared + warp * {memory.stage}")
    text = ".reg .b32 kvq_flag; mov.u32 kvq_flag, 0;"
    out.ptx(text, ["_"], ["lz"], scoped=False, name="DECLARE_FLAG")
