"""The writer of kernels."""

from __future__ import annotations

import pytest

from kvquant_compile.lowering.gluon.writer import Block, KernelWriter, listed, registers


def test_a_block_is_a_constant_and_a_call() -> None:
    out = KernelWriter()
    out.ptx("add.u32 $0, $1, $2;", ["x"], ["a", "b + 1"], pure=True, name="ADD")
    assert out.constants() == 'ADD = gl.constexpr("""{ add.u32 $0, $1, $2; }""")\n'
    assert out.text().strip() == (
        'x = gl.inline_asm_elementwise(ADD, "=&r,r,r", [a, b + 1], dtype=gl.int32,'
        " is_pure=True, pack=1)"
    )


def test_several_outputs_of_several_types() -> None:
    out = KernelWriter()
    out.ptx("...", ["x", "y"], ["a", "p"], kinds="fl", into="rf", name="BOTH")
    assert 'x, y = gl.inline_asm_elementwise(BOTH, "=&r,=&f,f,l", [a, p]' in out.text()
    assert "dtype=(gl.int32, gl.float32)" in out.text()


def test_equal_texts_share_a_constant_and_others_get_a_number() -> None:
    out = KernelWriter()
    for text in ("a;", "b;", "a;", "b;", "c;"):
        out.ptx(text, ["x"], ["y"], name="T")
    names = [line.split(" = ")[0] for line in out.constants().splitlines()]
    assert names == ["T", "T_1", "T_2"]
    assert [line.split("(")[1].split(",")[0] for line in out.text().strip().splitlines()] == [
        "T", "T_1", "T", "T_1", "T_2",
    ]  # fmt: skip


def test_constraints_and_purity_are_part_of_a_block() -> None:
    out = KernelWriter()
    out.ptx("a;", ["x"], ["y"], name="T")
    out.ptx("a;", ["x"], ["y"], pure=True, name="T")
    assert "T_1" in out.constants()
    assert Block("", "rf", "rl", False).constraints == "=&r,=&f,r,l"


def test_a_block_that_gives_nothing_gives_zero() -> None:
    out = KernelWriter()
    out.ptx("bar.sync 0;", ["_"], ["lz"], name="BARRIER")
    assert "bar.sync 0; mov.u32 $0, 0;" in out.constants()
    assert "is_pure=False" in out.text()


def test_unscoped_blocks_declare_for_all() -> None:
    out = KernelWriter()
    out.ptx(".reg .b32 q;", ["_"], ["lz"], scoped=False, name="Q")
    assert '"""' + ".reg" in out.constants()


def test_kinds_must_fit_the_operands() -> None:
    with pytest.raises(AssertionError, match="ODD"):
        KernelWriter().ptx("a;", ["x"], ["y"], kinds="rr", name="ODD")
    with pytest.raises(AssertionError, match="ODD"):
        KernelWriter().ptx("a;", ["x"], ["y"], into="rr", name="ODD")


def test_operands() -> None:
    assert registers(3, 2) == ["$3", "$4"]
    assert listed(["a", "b"]) == "{a, b}"
