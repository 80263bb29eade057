"""PTX that turns packed codes into matrix operands, and the products themselves."""

from __future__ import annotations

from collections.abc import Sequence

from kvquant_compile.codec.fragments import GROUP
from kvquant_compile.lowering.gluon.writer import KernelWriter, listed, registers
from kvquant_compile.lowering.half_words import BYTES_AS_1024

HALVES = "cvt.rn.f16x2.f32 $0, $2, $1;"
"""Two floats as halves of one word."""

ONES = "0x3C003C00"
HIGH_1024 = f"{BYTES_AS_1024:#x}"


def unpack(out: KernelWriter, words: Sequence[str], bits: int, group: int) -> list[str]:
    """The four selectors of a group of packed words; a selector holds eight codes in its nibbles.

    Args:
        words: all words of a lane and chunk.
        bits: of a code.
        group: which four selectors.

    Returns:
        variables ``sel0 .. sel3``, or the words themselves at 4 bits.
    """
    mine = list(words[group * bits : group * bits + bits])
    if bits == 4:
        return mine
    names = [f"sel{i}" for i in range(GROUP)]
    if bits == 3:
        text = (
            "and.b32 $0, $4, 0x77777777; and.b32 $1, $5, 0x77777777; and.b32 $2, $6, 0x77777777;\n"
            ".reg .b32 a, b, c; shr.b32 a, $4, 3; shr.b32 b, $5, 2; shr.b32 c, $6, 1;\n"
            "and.b32 a, a, 0x11111111; lop3.b32 a, b, 0x22222222, a, 0xEA;\n"
            "lop3.b32 $3, c, 0x44444444, a, 0xEA;"
        )
    elif bits == 2:
        text = ".reg .b32 a;\n" + "".join(
            f"and.b32 ${2 * i}, ${4 + i}, 0x33333333; shr.b32 a, ${4 + i}, 2;"
            f" and.b32 ${2 * i + 1}, a, 0x33333333;\n"
            for i in range(2)
        )
    else:
        text = "and.b32 $0, $4, 0x11111111;\n.reg .b32 a;\n" + "".join(
            f"shr.b32 a, $4, {i}; and.b32 ${i}, a, 0x11111111;\n" for i in range(1, 4)
        )
    out.ptx(text, names, mine, pure=True, name="UNPACK")
    return names


def table_words(bits: int) -> int:
    """Registers that hold a table: eight entries fill two."""
    return 4 if bits == 4 else 2


def lookup(target: str, selector: str, table: Sequence[str]) -> str:
    """Four table bytes of the codes in a selector's low half; needs a register ``tmp``.

    Sixteen entries are two tables of eight: a byte permute gives 0 for the nibbles of the other
    one, because entries are below 128 and the permute's sign mode spreads their top bit.
    """
    text = f"prmt.b32 {target}, {table[0]}, {table[1]}, {selector};\n"
    if len(table) == 4:
        text += (
            f"xor.b32 tmp, {selector}, 0x88888888; prmt.b32 tmp, {table[2]}, {table[3]}, tmp;"
            f" or.b32 {target}, {target}, tmp;\n"
        )
    return text


def upper(target: str, selector: str, table: Sequence[str]) -> str:
    """The high half of a selector, moved down; needs a register ``one`` that holds ones.

    A shift would take the busiest pipe. Times one is exact: nibbles up to 7 are no NaN.
    """
    if len(table) == 4:
        return f"shr.b32 {target}, {selector}, 16;\n"
    return (
        f"{{ .reg .b16 lo, hi; mov.b32 {{lo, hi}}, {selector}; mov.b32 {target}, {{hi, hi}};"
        f" mul.rn.f16x2 {target}, {target}, one; }}\n"
    )


def key_fragment(a: Sequence[str], selector: str, table: Sequence[str], high: str) -> str:
    """A selector's eight codes as the A fragment ``a`` of a key product.

    Args:
        a: four registers: row g, row g + 8, then both for the upper columns.
        selector: the selector.
        table: registers with the table.
        high: bytes to put above the table's: 0 for subnormal halves u 2**-24, or HIGH_1024.
    """
    low, next_ = (
        f"prmt.b32 {a[i]}, x, {high}, 0x4140; prmt.b32 {a[i + 2]}, x, {high}, 0x4342;\n"
        for i in range(2)
    )
    return (
        lookup("x", selector, table) + low
        + upper("y", selector, table) + lookup("x", "y", table) + next_
    )  # fmt: skip


def product(d: Sequence[str], a: Sequence[str], b: Sequence[str], c: Sequence[str]) -> str:
    """``d = a b + c``: 16x8x16, halves, float32 sums."""
    return (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        f"{listed(d)}, {listed(a)}, {listed(b)}, {listed(c)};\n"
    )


def byte_product(d: Sequence[str], a: Sequence[str], b: Sequence[str], c: Sequence[str]) -> str:
    """``d = a b + c``: 16x8x32, signed table bytes times unsigned weights, exact."""
    return (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 "
        f"{listed(d)}, {listed(a)}, {listed(b)}, {listed(c)};\n"
    )


def load_shared(
    out: KernelWriter, names: Sequence[str], address: str, *offsets: int, kind: str = "r"
) -> None:
    """Load 16 bytes, as four variables of a kind, from every offset behind an address."""
    count = 4 * len(offsets)
    text = "".join(
        f"ld.shared.v4.b32 {listed(registers(4 * i, 4))}, [${count}+{offset}];\n"
        for i, offset in enumerate(offsets)
    )
    out.ptx(text, names, [address], into=kind * count, name="LOAD16")


def load_codes(out: KernelWriter, names: Sequence[str], base: str, offset: int) -> None:
    """A lane's words of one chunk, as they lie in a page: [vector][lane][words]."""
    count = len(names)
    width = next(w for w in (4, 2, 1) if count % w == 0)
    vector = f".v{width}" if width > 1 else ""
    text = ""
    for j in range(count // width):
        regs = registers(j * width, width)
        target = listed(regs) if width > 1 else regs[0]
        text += f"ld.shared{vector}.b32 {target}, [${count}+{offset + 128 * width * j}];\n"
    out.ptx(text, names, [f"{base} + lane * {4 * width}"], name="CODES")


def warp_sync(out: KernelWriter) -> None:
    """Order this warp's shared memory."""
    out.ptx("bar.warp.sync -1;", ["_"], ["lz"], name="WARP_SYNC")


def program_sync(out: KernelWriter) -> None:
    """Order all warps' shared memory."""
    out.ptx("bar.sync 0;", ["_"], ["lz"], name="BARRIER")


ALL_LANES = (1, 2, 4, 8, 16)


def reduce_lanes(
    out: KernelWriter,
    name: str,
    combine: str,
    *,
    kind: str = "f",
    lanes: Sequence[int] = (4, 8, 16),
) -> None:
    """Combine a variable over lanes whose numbers differ in the bits ``lanes``."""
    for lane in lanes:
        text = f"shfl.sync.bfly.b32 $0, $1, {lane}, 31, -1;"
        out.ptx(text, ["other"], [name], kinds=kind, into=kind, pure=True, name="BUTTERFLY")
        out(f"{name} = {combine.format(name, 'other')}")
