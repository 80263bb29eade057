"""When a dump is written, where, and what it says of refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import kvquant_compile
from kvquant_compile.config import SLOTS
from kvquant_compile.dump import VARIABLE, dumping
from kvquant_compile.errors import OptionError, UnsupportedLayerError
from kvquant_compile.observer import SILENT
from kvquant_compile.runtime.installed import ATTRIBUTE
from tests.dump.conftest import TEXT
from tests.dump.html import Page
from tests.zoo import decoder, tiny, tokens, unproved


def page_of(folder: Path) -> Page:
    return Page.of((folder / "index.html").read_text(encoding="utf-8"))


def test_nothing_is_watched_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert dumping(None, "Model") is SILENT


def test_the_environment_names_a_folder_for_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / "GPT2LMHeadModel-0").mkdir()
    kvquant_compile.optimize(tiny("gpt2"), 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["GPT2LMHeadModel-0", "GPT2LMHeadModel-1"]
    assert list((tmp_path / "GPT2LMHeadModel-0").iterdir()) == []
    page = page_of(tmp_path / "GPT2LMHeadModel-1")
    assert "no position reaches this tensor" in page.text
    assert "Calibration saw no activations" in page.text
    assert "lossless" in page.text


def test_a_bad_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    model = tiny("llama")
    with pytest.raises(OptionError, match="Name a folder"):
        kvquant_compile.optimize(model, 3, dump=tmp_path / "file")
    assert ATTRIBUTE not in model.__dict__


def test_a_refusal_leaves_a_page_that_tells_it(tmp_path: Path) -> None:
    model = unproved()
    with pytest.raises(UnsupportedLayerError):
        kvquant_compile.optimize(model, 3, calibration=TEXT, dump=tmp_path)
    page = page_of(tmp_path)
    assert "keys cannot be stored before RoPE" in page.text
    assert "no proved rotary embedding" in page.text
    assert "03 recognised" in page.text
    assert "04 rewritten" not in page.text


def test_hand_written_decoders_and_recipes_of_blocks(tmp_path: Path) -> None:
    kvquant_compile.optimize(
        decoder("MatmulDecoder"), 4, recipe="kivi", calibration=TEXT,
        example_inputs=(tokens(), None), dump=tmp_path,
    )  # fmt: skip
    page = page_of(tmp_path)
    assert "kvquant::attend" in page.text
    assert "kivi" in page.text


def test_statistics_are_those_of_the_tables(tmp_path: Path) -> None:
    from kvquant_compile.dump.record import Dump
    from kvquant_compile.evaluate.stored import PARTS

    seen: list[Dump] = []

    class Kept(Dump):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvquant_compile.dump.record.Dump", Kept)
        model = kvquant_compile.optimize(tiny("cohere"), 3, calibration=TEXT, dump=tmp_path)
    (dump,) = seen
    assert [(s.index, s.part) for s in dump.statistics] == [(i, p) for i in (0, 1) for p in PARTS]
    tables = kvquant_compile.artifact(model).tables
    for s in dump.statistics:
        assert s.normalised is not None
        name = "key_table" if s.part == "keys" else "value_table"
        assert torch.equal(s.normalised.levels, getattr(tables[s.index], name).float())
        area = s.normalised.density.sum(1) * 2 * s.normalised.edge / s.normalised.density.shape[1]
        torch.testing.assert_close(area, torch.ones_like(area))
        slots = SLOTS[PARTS.index(s.part)]  # of every token
        torch.testing.assert_close(s.normalised.outliers.sum(1), torch.full((2,), float(slots)))
        # 3 bits: about 1/40 of the variance, and never as much as coding nothing
        assert 0.002 < (s.error or 0.0) < 0.15
        assert s.loss is not None
        assert math.isfinite(s.loss)
        assert (s.quantiles.diff(dim=0) >= 0).all()
