"""What cannot be exported says so before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvquant_compile
from kvquant_compile import MissingDependencyError, OnnxSession, OptionError, export_onnx
from kvquant_compile.export import extras
from tests.zoo import tiny, tokens


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optional packages, as if they were installed."""
    monkeypatch.setattr("kvquant_compile.export.onnx_file.need", lambda *names: [])


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize(
    ("options", "dtype", "reason"),
    [
        ({"bits": 16}, torch.float32, "lossless pages hold raw floats"),
        ({"recipe": "kivi"}, torch.float32, "recipe kivi"),
        ({"bits": 3}, torch.bfloat16, "computes in torch.bfloat16"),
    ],
)
def test_formats(options: Any, dtype: torch.dtype, reason: str, tmp_path: Path) -> None:
    model = tiny("llama").to(dtype)
    calibration = None if options.get("bits") == 16 else tokens(4, 64)
    kvquant_compile.optimize(model, calibration=calibration, **options)
    with pytest.raises(OptionError, match=reason):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_packages")
def test_ops_of_other_libraries(tmp_path: Path) -> None:
    model = kvquant_compile.optimize(tiny("gpt_oss"), 3, calibration=tokens(4, 64))
    with pytest.raises(OptionError, match=r"grouped_mm|cannot be traced"):
        export_onnx(model, tmp_path / "model.onnx")


@pytest.mark.usefixtures("no_packages")
def test_opsets_and_models_that_are_not_optimised(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="opset=17"):
        export_onnx(tiny("llama"), tmp_path / "model.onnx", opset=17)
    with pytest.raises(OptionError, match="not optimised"):
        export_onnx(tiny("llama"), tmp_path / "model.onnx")


def test_missing_packages_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: export_onnx(tiny("llama"), tmp_path / "x"), lambda: OnnxSession("x")):
        with pytest.raises(MissingDependencyError, match=r"pip install .kvquant-compile\[onnx\]"):
            call()


def test_packages_that_are_there_are_returned() -> None:
    assert extras.need("sys", "json")[0] is sys
