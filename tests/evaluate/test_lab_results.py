"""What a laboratory has measured is kept: later runs go on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from torch import Tensor

from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate import lab as lab_module
from kvquant_compile.evaluate import source as source_module
from kvquant_compile.evaluate.points import Point
from kvquant_compile.evaluate.results import Results, schema
from tests.evaluate.laboratory import DATA, laboratory

TWO = Point("kvquant+", "2")


def test_a_later_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    laboratory(path, limit=1).scores([TWO])
    runs: list[Tensor] = []
    compare = lab_module.compare
    monkeypatch.setattr(lab_module, "compare", lambda *a: runs.append(a[2]) or compare(*a))
    both = laboratory(path, limit=2).scores([TWO])
    assert len(runs) == 2  # the second window, of the original and of the codec
    fresh = laboratory(limit=2).scores([TWO])
    assert both == fresh
    jsonschema.validate(json.loads(path.read_text()), schema())

    monkeypatch.setattr(source_module, "prepare", None)  # nothing is calibrated again
    assert laboratory(path, limit=2).scores([TWO]) == both
    assert laboratory(path, limit=1).scores([TWO])[1].score.windows == 1
    for changed in (
        {"text": DATA},
        {"window": 90},
        {"calibration": CalibrationOptions.make(seed=1)},
    ):
        with pytest.raises(TypeError):
            laboratory(path, **changed).scores([TWO])


def test_an_interrupted_run_keeps_its_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, compare = tmp_path / "results.json", lab_module.compare
    calls: list[int] = []

    def broken(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compare(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(lab_module, "compare", broken)
        with pytest.raises(KeyboardInterrupt):
            laboratory(path).scores([TWO])
    kept = {r["identity"]["recipe"]: r["value"] for r in json.loads(path.read_text())["results"]}
    assert [len(kept[name]["windows"]) for name in ("original", "kvquant+")] == [2, 1]
    assert laboratory(path).scores([TWO]) == laboratory().scores([TWO])


def test_results_that_come_together_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = Results(path)
    with results.written_once():
        results.put({"measure": "a"}, 1)
        assert not path.exists()
    assert Results(path).get({"measure": "a"}) == 1
    results.put({"measure": "b"}, 2)
    assert Results(path).get({"measure": "b"}) == 2


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "other", "version": 1}', "[]"])
def test_other_files_are_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(OptionError, match="cannot go on"):
        Results(path)
    assert path.read_text() == text
