"""Optimised models as folders: what is loaded is what was saved, and nothing is calibrated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvquant_compile
from kvquant_compile import ArtifactError, OptionError
from kvquant_compile.calib import calibrate as calibration
from kvquant_compile.card import BEGIN, END
from kvquant_compile.pretrained import CONFIG, TABLES
from kvquant_compile.runtime.installed import ATTRIBUTE, installed
from tests.zoo import decoder, tiny, tokens

TEXT = tokens(8, 64, seed=7)
GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("saved")
    model = kvquant_compile.optimize(
        tiny("llama"), bits=(3, 4), calibration=TEXT, attend_quantized=True, prefill_chunk=512
    )
    kvquant_compile.save_pretrained(model, folder)
    return model, folder


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any fit, observation or sampling of text fails."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("calibrated")

    names = [
        name
        for name, x in vars(calibration).items()
        if callable(x)
        and (getattr(x, "__module__", "").startswith("kvquant_compile.calib") and name[0].islower())
    ]
    assert {"fit_tables", "choose_windows"} <= set(names)
    for name in names:
        monkeypatch.setattr(calibration, name, refuse)
    for name in ("asked.calibrate", "asked.calibrate_mixed", "api.sample_windows"):
        monkeypatch.setattr(f"kvquant_compile.{name}", refuse)


@pytest.mark.usefixtures("no_calibration")
def test_a_loaded_model_generates_the_same_without_calibration(
    saved: tuple[PreTrainedModel, Path],
) -> None:
    model, folder = saved
    loaded = kvquant_compile.from_pretrained(folder)
    ids = tokens(2, 100)
    assert torch.equal(loaded.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    report, expected = kvquant_compile.explain(loaded), kvquant_compile.explain(model)
    assert report.effective_bits == expected.effective_bits
    state = installed(loaded)
    assert state.attend_quantized
    assert state.prefill_chunk == 512


def test_a_saved_cache_goes_on_in_the_loaded_model(
    saved: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, folder = saved
    with torch.no_grad():
        cache = model(tokens(1, 100), use_cache=True).past_key_values
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvquant_compile.from_pretrained(folder)
    again = kvquant_compile.load_cache(tmp_path / "cache.safetensors", loaded)
    with torch.no_grad():
        got = loaded(tokens(1, 3), past_key_values=again).logits
        assert torch.equal(got, model(tokens(1, 3), past_key_values=cache).logits)


@pytest.mark.parametrize("ours", [True, False], ids=["our folder", "plain save_pretrained"])
def test_transformers_alone_loads_the_original(
    saved: tuple[PreTrainedModel, Path], tmp_path: Path, ours: bool
) -> None:
    model, folder = saved
    if not ours:
        model.save_pretrained(folder := tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert ATTRIBUTE not in plain.__dict__
    original = tiny("llama")
    assert plain.state_dict().keys() == original.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain(tokens()).logits, original(tokens()).logits)
        ids = tokens(1, 100)
        assert torch.equal(plain(ids).logits, original(ids).logits)
        with kvquant_compile.quantised_attention(model):
            assert not torch.equal(model(ids).logits, original(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "qwen3", "cohere"])
def test_other_architectures_come_back(kind: str, tmp_path: Path) -> None:
    model = kvquant_compile.optimize(tiny(kind), bits=3, calibration=TEXT)
    kvquant_compile.save_pretrained(model, tmp_path)
    loaded = kvquant_compile.from_pretrained(tmp_path, dtype="auto")
    ids = tokens(1, 70)
    assert torch.equal(loaded.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_the_card(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = saved
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    report = kvquant_compile.explain(model)
    assert f"{report.bytes_per_token:,.1f} bytes a token" in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(report.layers)
    for layer, row in zip(report.layers, rows[1:], strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:4] == [str(layer.index), "kvquant+", "3", "4"]
        assert float(cells[4]) == pytest.approx(layer.effective_bits, abs=1e-3)
    (tmp_path / "README.md").write_text(f"# Mine\n\ntext\n\n{BEGIN}\nold\n{END}\n\nmore\n")
    kvquant_compile.save_pretrained(model, tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert again.startswith("# Mine\n\ntext\n")
    assert again.endswith("\n\nmore\n")
    assert "old" not in again
    assert again.count(BEGIN) == again.count(END) == 1


def test_nothing_but_known_files_is_written(saved: tuple[PreTrainedModel, Path]) -> None:
    _, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert {TABLES, CONFIG, "README.md", "config.json", "model.safetensors"} <= names
    assert not [name for name in names if name.endswith((".pt", ".bin", ".pkl"))]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("damage", ["no tables", "no config", "config", "version", "tables",
                                    "name", "weights"])  # fmt: skip
def test_folders_that_do_not_fit_together_are_refused(
    saved: tuple[PreTrainedModel, Path], damage: str, tmp_path: Path
) -> None:
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    if damage == "no tables":
        (tmp_path / TABLES).unlink()
    elif damage == "no config":
        (tmp_path / CONFIG).unlink()
    elif damage == "config":
        (tmp_path / CONFIG).write_text("{")
    elif damage == "version":
        change(tmp_path / CONFIG, version=99)
    elif damage == "name":
        change(tmp_path / CONFIG, tables="../elsewhere.safetensors")
    elif damage == "tables":
        content = (tmp_path / TABLES).read_bytes()
        (tmp_path / TABLES).write_bytes(content[: len(content) // 2])
    else:
        tiny("llama", seed=1).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError):
        kvquant_compile.from_pretrained(tmp_path)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not optimised"):
        kvquant_compile.save_pretrained(tiny("llama"), tmp_path)
    own = kvquant_compile.optimize(
        decoder("SdpaDecoder").eval(), bits=16, example_inputs=(tokens(), None)
    )
    with pytest.raises(OptionError, match="no transformers model"):
        kvquant_compile.save_pretrained(own, tmp_path)
    assert not list(tmp_path.iterdir())
