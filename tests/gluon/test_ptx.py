"""The interpreter of PTX itself, on small kernels written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.gluon.ptx.decode import decode
from tests.gluon.ptx.errors import BadAccess, Divergence, Hazard, PtxError, UnknownInstruction
from tests.gluon.ptx.floats import FLOATS
from tests.gluon.ptx.integers import INTEGERS
from tests.gluon.ptx.lanes import G, T, byte_product, product
from tests.gluon.ptx.machine import Schedule, launch
from tests.gluon.ptx.memory import Memory

HEAD = """
.version 8.0
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 .ptr .global .align 1 k_in, .param .u64 k_out, .param .f32 k_x)
{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<8>; // registers
    .loc 1 7 3
    ld.param.b64 %d0, [k_in]; ld.param.b64 %d1, [k_out]; ld.param.b32 %r31, [k_x];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %laneid; mov.u32 %r2, global_smem;
    mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2;
    ld.global.b32 %r3, [%d3];
"""
TAIL = "st.global.b32 [%d4], %r4; ret; }"


def run(
    body: str, data: NDArray | None = None, *, warps: int = 1, seed: int = 0, x: float = 0.0
) -> NDArray[np.uint32]:
    """What a body makes of a word a thread, in %r3, and leaves in %r4."""
    data = np.arange(32 * warps, dtype=np.uint32) if data is None else data
    memory = Memory(1 << 16)
    source, target = memory.place(data), memory.place(np.zeros(32 * warps, np.uint32))
    kernel = decode(HEAD + body + TAIL, "k")
    launch(kernel, (1, 1, 1), warps, 4096, [source, target, x], memory, Schedule(seed))
    return memory.view(target, 128 * warps).view(np.uint32).copy()


def test_straight_code_and_guards() -> None:
    found = run("setp.lt.u32 %p1, %r3, 7; mov.u32 %r4, 5; @%p1 add.u32 %r4, %r3, 100;")
    assert found[:8].tolist() == [100, 101, 102, 103, 104, 105, 106, 5]


def test_names_belong_to_their_braces() -> None:
    loop = "{ .reg .b32 x; mov.u32 x, 0; L: add.u32 x, x, 1; setp.lt.u32 %p1, x, %r5; @%p1 bra L; "
    text = f"mov.u32 %r5, 3; {loop} mov.u32 %r4, x; }} mov.u32 %r5, 4; {loop}"
    assert run(text + "shl.b32 x, x, 8; or.b32 %r4, %r4, x; }")[0] == 0x403


def test_lanes_part_and_meet_again() -> None:
    text = """
        mov.u32 %r4, 0; and.b32 %r5, %r3, 1; setp.eq.u32 %p1, %r5, 0;
        @%p1 bra EVEN;
        add.u32 %r4, %r4, 10; setp.gt.u32 %p2, %r3, 20; @%p2 bra END;
        add.u32 %r4, %r4, 5; bra.uni END;
        EVEN: add.u32 %r4, %r4, 1; setp.lt.u32 %p3, %r4, %r3; @%p3 bra EVEN;
        END: bar.warp.sync -1; add.u32 %r4, %r4, 1000;
    """
    odd = [1015 if n <= 20 else 1010 for n in range(32)]
    even = [1000 + max(n, 1) for n in range(32)]
    assert run(text).tolist() == [odd[n] if n % 2 else even[n] for n in range(32)]


def test_arguments_and_numbers() -> None:
    found = run("mul.rn.f32 %r4, %r31, 0f40000000;", x=1.75)
    assert found.view(np.float32)[0] == 3.5


@pytest.mark.parametrize("warps", [1, 3])
def test_neighbours_through_shared_memory(warps: int) -> None:
    text = """
        shl.b32 %r5, %r0, 2; add.u32 %r5, %r5, %r2; st.shared.b32 [%r5], %r3;
        bar.sync 0;
        xor.b32 %r6, %r0, 31; shl.b32 %r6, %r6, 2; add.u32 %r6, %r6, %r2;
        ld.shared.b32 %r4, [%r6];
    """
    for seed in range(3):
        found = run(text, warps=warps, seed=seed)
        assert found.tolist() == [n ^ 31 for n in range(32 * warps)]
    with pytest.raises(Hazard, match="reads what lane"):
        run(text.replace("bar.sync 0;", ""), warps=warps)


def test_overwriting_what_another_lane_read() -> None:
    text = """
        shl.b32 %r5, %r0, 2; add.u32 %r5, %r5, %r2; xor.b32 %r6, %r5, 124;
        ld.shared.b32 %r4, [%r6]; SYNC st.shared.b32 [%r5], %r3;
    """
    run(text.replace("SYNC", "bar.warp.sync -1;"))
    with pytest.raises(Hazard, match="overwrites what lane"):
        run(text.replace("SYNC", ""))


COPY = """
    setp.eq.u32 %p1, %r1, 0; mov.u32 %r8, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r2+512], 1; bar.warp.sync -1;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2+512], 128;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r2], [%d0], 128, [%r2+512];
    AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+512], %r8; @!%p2 bra AGAIN;
    shl.b32 %r5, %r1, 2; add.u32 %r5, %r5, %r2; ld.shared.b32 %r4, [%r5];
"""


def test_a_bulk_copy() -> None:
    assert run(COPY).tolist() == list(range(32))


def _run_in_orders(text: str) -> None:
    for seed in range(8):
        run(text, seed=seed)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (r"@!%p2 bra AGAIN;", "", "not waited for"),
        ("[%r2+512], 128;", "[%r2+512], 256;", "waits for ever"),
        ("bar.warp.sync -1;", "ld.shared.b32 %r4, [%r2];", "overwrites by a copy"),
        ("[%d0], 128", "[%d0], 144", "not allocated"),
        ("AGAIN: ", "ret; AGAIN: ", "ends while a copy"),
    ],
)
def test_mistakes_with_bulk_copies(
    old: str, new: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.gluon.ptx.copies.PATIENCE", 50)
    assert old in COPY
    with pytest.raises(PtxError, match=complaint):
        _run_in_orders(COPY.replace(old, new))


def test_atomics() -> None:
    text = """
        setp.eq.u32 %p1, %r0, 0; mov.u32 %r5, 0; @%p1 st.shared.b32 [%r2], %r5; bar.sync 0;
        red.shared.add.u32 [%r2], 2; atom.global.relaxed.gpu.add.u32 %r6, [%d0], 0;
        bar.sync 0; ld.shared.b32 %r4, [%r2];
    """
    assert run(text, warps=2).tolist() == [128] * 64


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("frob.b32 %r4, %r3;", UnknownInstruction),
        ("add.u32 %r4, %r3;", UnknownInstruction),
        ("add.u32 %r4, %r3, %q7;", UnknownInstruction),
        ("ld.global.b32 %r4, [%d3+4096];", BadAccess),
        ("ld.global.v2.b32 {%r4, %r5}, [%d3+4];", BadAccess),
        ("ld.shared.b32 %r4, [%r2+8192];", BadAccess),
        ("setp.eq.u32 %p1, %r3, 0; @%p1 bar.sync 0;", Divergence),
    ],
)
def test_errors_say_where(body: str, error: type[PtxError]) -> None:
    with pytest.raises(error, match=body.split("; ")[-1].split(" ")[0].replace(".", r"\.")):
        run(body)


def test_byte_permutation_and_tables_of_bits() -> None:
    x, y = (np.full(32, v, np.uint32) for v in (0x83020100, 0x07060504))
    permute = INTEGERS["prmt.b32"].function
    assert permute(x, y, np.full(32, 0x7351, np.uint32))[0] == 0x07830501
    assert permute(x, y, np.full(32, 0xB8B8, np.uint32))[0] == 0xFF00FF00
    table = np.full(32, 0xEA, np.uint32)  # a & b | c
    found = INTEGERS["lop3.b32"].function(x, y, np.full(32, 8, np.uint32), table)
    assert found[0] == 0x83020100 & 0x07060504 | 8


@pytest.mark.parametrize(
    ("opcode", "sources", "expected"),
    [
        ("mul.hi.s32", (-3, 1 << 30), -1),
        ("mad.hi.s32", (1 << 30, 8, 5), 7),
        ("div.s32", (-7, 2), -3),
        ("rem.s32", (-7, 2), -1),
        ("shr.s32", (-8, 40), -1),
        ("shl.b32", (1, 32), 0),
        ("bfe.u32", (0x1234, 4, 8), 0x23),
        ("bfe.s32", (0x40000000, 28, 3), -4),
        ("bfe.s32", (0x40000000, 28, 2), 0),
        ("bfe.s32", (-1, 40, 5), -1),
        ("dp2a.lo.s32.s32", (0x0002FFFF, 0x0504FD80, 7), 7 + 128 - 6),
        ("dp2a.hi.s32.s32", (0x0002FFFF, 0x0504FD80, 7), 7 - 4 + 10),
        ("add.s16x2", (0x0001FFFF, 0x00020001), 0x00030000),
        ("popc.b32", (-1,), 32),
        ("max.relu.s32", (-5, -7), 0),
    ],
)
def test_integer_instructions(opcode: str, sources: tuple[int, ...], expected: int) -> None:
    lanes = [np.full(32, v % 2**32, np.uint32) for v in sources]
    assert int(INTEGERS[opcode].function(*lanes).view(np.int32)[5]) == expected


def test_float_comparisons_with_nan() -> None:
    nan, one = (np.full(32, v, np.float32).view(np.uint32) for v in (np.nan, 1.0))
    names = ("eq", "ne", "lt", "equ", "neu", "ltu")
    found = [bool(FLOATS[f"setp.{n}.f32"].function(nan, one)[0]) for n in names]
    assert found == [False, False, False, True, True, True]


def test_a_fused_multiply_add_rounds_once() -> None:
    """To twice the precision the sum is a tie; what is lost there decides."""
    x, y = np.float32(1 + 2.0**-12), np.float32(1 + 2.0**-12)  # product 1 + 2^-11 + 2^-24
    tiny = np.float32(2.0**-80)
    words = [[np.full(32, v, np.float32).view(np.uint32) for v in (x, y, z)]
             for z in (tiny, -tiny)]  # fmt: skip
    above, below = (FLOATS["fma.rn.f32"].function(*w).view(np.float32)[0] for w in words)
    assert below == np.float32(1 + 2.0**-11)
    assert above == np.float32(1 + 2.0**-11 + 2.0**-23)


def _packed(*values: NDArray, dtype: type) -> NDArray[np.uint32]:
    return np.ascontiguousarray(np.stack(values, -1).astype(dtype)).view(np.uint32)[:, 0]


def test_matrix_products() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (16, 16)), rng.integers(-9, 9, (16, 8))
    words = [_packed(*(a[G + 8 * (r & 1), 2 * T + 8 * (r >> 1) + k] for k in range(2)),
                     dtype=np.float16) for r in range(4)]  # fmt: skip
    words += [_packed(*(b[2 * T + 8 * r + k, G] for k in range(2)), dtype=np.float16)
              for r in range(2)]  # fmt: skip
    one = np.ones(32, np.float32).view(np.uint32)
    d = product(*words, *[one] * 4)
    for r in range(4):
        expected = (a @ b + 1)[G + 8 * (r >> 1), 2 * T + (r & 1)]
        assert (d[r].view(np.float32) == expected).all()


def test_byte_products() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (16, 32)), rng.integers(0, 256, (32, 8))
    words = [_packed(*(a[G + 8 * (r & 1), 4 * T + 16 * (r >> 1) + k] for k in range(4)),
                     dtype=np.int8) for r in range(4)]  # fmt: skip
    words += [_packed(*(b[4 * T + 16 * r + k, G] for k in range(4)), dtype=np.uint8)
              for r in range(2)]  # fmt: skip
    d = byte_product(*words, *[np.zeros(32, np.uint32)] * 4)
    for r in range(4):
        assert (d[r].view(np.int32) == (a @ b)[G + 8 * (r >> 1), 2 * T + (r & 1)]).all()


def test_shuffles_matrices_and_votes() -> None:
    assert run("shfl.sync.bfly.b32 %r4, %r3, 5, 31, -1;").tolist() == [n ^ 5 for n in range(32)]
    quad = run("shfl.sync.idx.b32 %r4, %r3, 2, 0x1c03, -1;")
    assert quad.tolist() == [n // 4 * 4 + 2 for n in range(32)]
    once = "movmatrix.sync.aligned.m8n8.trans.b16 %r4, %r3;"
    twice = once + "movmatrix.sync.aligned.m8n8.trans.b16 %r4, %r4;"
    assert run(once).tolist() != list(range(32))
    assert run(twice).tolist() == list(range(32))
    vote = "setp.eq.u32 %p1, %r3, 9; vote.sync.any.pred %p1, %p1, -1; selp.u32 %r4, 1, 0, %p1;"
    assert run(vote).all()
    assert not run(vote.replace(" 9;", " 99;")).any()


def test_a_maximum_takes_nan() -> None:
    x, y = (np.full(32, word, np.uint32) for word in (0x3C004000, 0x7E013C00))
    assert int(FLOATS["max.NaN.f16x2"].function(x, y)[5]) == 0x7FFF4000


LANE_COPIES = """
    shl.b32 %r5, %r1, 4; add.u32 %r5, %r5, %r2; and.b32 %r6, %r1, 7; mul.wide.u32 %d5, %r6, 16;
    add.s64 %d5, %d5, %d0; setp.lt.u32 %p1, %r1, 8;
    @%p1 cp.async.cg.shared.global [%r5], [%d5], 16; cp.async.commit_group;
    @%p1 cp.async.cg.shared.global [%r5+512], [%d5], 16; cp.async.commit_group;
    cp.async.wait_group 1; bar.warp.sync -1;
    shl.b32 %r5, %r1, 2; add.u32 %r5, %r5, %r2; ld.shared.b32 %r4, [%r5];
    cp.async.wait_group 0;
"""


def test_copies_of_lanes() -> None:
    assert run(LANE_COPIES).tolist() == list(range(32))


@pytest.mark.parametrize(
    ("removed", "complaint"),
    [
        ("cp.async.wait_group 1;", "has not waited for"),
        ("bar.warp.sync -1;", "no barrier between"),
        ("cp.async.wait_group 0;", "on its way"),
    ],
)
def test_copies_of_lanes_without_a_wait(removed: str, complaint: str) -> None:
    with pytest.raises(Hazard, match=complaint):
        run(LANE_COPIES.replace(removed, ""))


def test_a_lane_may_read_its_own_copy() -> None:
    own = LANE_COPIES.replace("bar.warp.sync -1;", "").replace("%r1, 2;", "%r1, 4;")
    found = run(own.replace("ld.shared.b32", "mov.u32 %r4, 0; @%p1 ld.shared.b32"))
    assert found[:8].tolist() == [4 * n for n in range(8)]
