"""``kvquant-compile export`` on the embedded model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kvquant_compile import cli
from kvquant_compile.demo import ASSETS


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line; returns (exit code, stdout, stderr)."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvquant-compile", "export", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return command


def test_an_unknown_format_is_refused_before_anything_is_loaded(run: Any, tmp_path: Path) -> None:
    code, _, err = run("--model", "nowhere", "--format", "gguf", str(tmp_path / "model"))
    assert code == 2
    assert "known are onnx and pt2" in " ".join(err.split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_file_is_written(run: Any, kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra onnx")
    text, path = tmp_path / "text.txt", tmp_path / f"model.{kind}"
    text.write_text((ASSETS / "heldout.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    code, out, _ = run("--model", str(ASSETS), "--format", kind, "--calibration", str(text),
                       "--windows", "2", str(path))  # fmt: skip
    assert code == 0
    assert out == f"wrote {path} ({path.stat().st_size:,} bytes)\n"
