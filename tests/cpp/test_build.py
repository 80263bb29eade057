"""Compiling once, and what happens where that cannot be done."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import kvquant_compile
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering import ops
from kvquant_compile.lowering.cpp import build, dispatch, launch
from kvquant_compile.lowering.cpp.build import toolchain_failure
from tests.lowering.reference import half_rope
from tests.triton.cases import Built, Case
from tests.zoo import tiny, tokens

needs_compiler = pytest.mark.skipif(
    bool(toolchain_failure()), reason=toolchain_failure() or "never"
)
PROGRAM = 'extern "C" int number() { return 42; }\n'


@pytest.fixture(autouse=True)
def _decode_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "DECODE_STEPS", 16)


@pytest.fixture
def built() -> Built:
    return Case(CodecSpec(3, 3, 0, 0, False, 0), (32, 32), half_rope(32, 32)).build()


def run_op(built: Built) -> torch.Tensor:
    c, site = built.cache, built.site
    return ops.attend(
        built.query, built.key, built.value, built.slots, built.history, c.table, c.positions,
        c.pages, c.sinks, c.tables, c.geometry, None, site.scale, 0.0, 0, True, c.format,
    )[0]  # fmt: skip


@needs_compiler
def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.FOLDER, str(tmp_path))
    assert build.build(PROGRAM, "number").number() == 42
    made = sorted(path.suffix for path in tmp_path.iterdir())
    assert made == [".cpp", ".so"]
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.build(PROGRAM, "number").number() == 42


@needs_compiler
def test_a_damaged_library_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.FOLDER, str(tmp_path))
    with monkeypatch.context() as patch:  # it has never been loaded
        patch.setattr(build.ctypes, "CDLL", lambda path: path)
        path = Path(build.build(PROGRAM, "number"))
    path.write_bytes(path.read_bytes()[:100])
    assert build.build(PROGRAM, "number").number() == 42


@needs_compiler
def test_a_program_with_an_error_is_refused_with_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.FOLDER, str(tmp_path))
    with pytest.raises(build.CompilationError, match="error"):
        build.build("nonsense", "broken")
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_folder_that_cannot_be_written_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.FOLDER, "/dev/null/kernels")
    assert build.build(PROGRAM, "number").number() == 42


def test_without_a_compiler_torch_runs_and_says_so_once(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "toolchain_failure", lambda: "no C++ compiler at all")
    dispatch._warn.cache_clear()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler at all"):
        run_op(built)
    assert dispatch.kernel_name(built.layout) == "torch (CPU): no C++ compiler at all"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_op(built)


def test_a_kernel_that_does_not_compile_leaves_its_layer_to_torch(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = build.CompilationError("a kernel", why="this very one is broken", do="Nothing.")
    monkeypatch.setattr(launch, "kernel", lambda *_: broken)
    monkeypatch.setattr(dispatch, "toolchain_failure", str)
    dispatch._warn.cache_clear()
    with pytest.warns(UserWarning, match="this very one is broken"):
        found = run_op(built)
    assert found.isfinite().all()


@needs_compiler
def test_the_switch_and_the_report(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.kernel_name(built.layout).startswith("C++ (")
    assert dispatch.attend_implementation(built.query, str(built.layout)) is not None
    monkeypatch.setenv(dispatch.SWITCH, "torch")
    assert "KVQUANT_KERNELS=torch" in dispatch.kernel_name(built.layout)
    assert dispatch.attend_implementation(built.query, str(built.layout)) is None


@needs_compiler
def test_a_model_generates_the_same_tokens_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kvquant_compile.optimize(tiny("llama"), 3, calibration=tokens(4, 64, seed=7))
    prompt = tokens(2, 70, seed=3)
    found = []
    for kernels in ("auto", "torch"):
        monkeypatch.setenv(dispatch.SWITCH, kernels)
        found.append(model.generate(prompt, max_new_tokens=20, do_sample=False))
    assert torch.equal(*found)
    monkeypatch.setenv(dispatch.SWITCH, "auto")
    layers = kvquant_compile.explain(model).layers
    assert {x.implementation for x in layers} == {"generated kernel"}
