"""What optimize calibrates on: seeds, artifacts, every kind of data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, PreTrainedModel

import kvquant_compile
from kvquant_compile.calib.data import WindowSettings, calibration_windows
from kvquant_compile.runtime.installed import installed
from tests.api.helpers import TEXT, quantised, same_tables
from tests.zoo import tiny, tokens


@pytest.mark.parametrize("sampled", [False, True])
def test_a_seed_decides_everything(sampled: bool) -> None:
    data = None if sampled else tokens(12, 40, seed=1)
    options = {"calibration": data, "windows": 2, "bits": 2}
    torch.manual_seed(1)
    first = kvquant_compile.optimize(tiny("llama"), **options, seed=5)
    torch.manual_seed(2)
    again = kvquant_compile.optimize(tiny("llama"), **options, seed=5)
    other = kvquant_compile.optimize(tiny("llama"), **options, seed=6)
    assert same_tables(first, again)
    assert torch.equal(quantised(first), quantised(again))
    assert not same_tables(first, other)


def test_calibration_leaves_the_random_state_alone() -> None:
    model = tiny("llama")
    state = torch.get_rng_state()
    kvquant_compile.optimize(model, bits=2, windows=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_artifact_gives_the_same_model_without_calibration(
    three: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tables.safetensors"
    kvquant_compile.artifact(three).save(path)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("calibration ran")

    monkeypatch.setattr("kvquant_compile.asked.calibrate", never)
    monkeypatch.setattr("kvquant_compile.calib.calibrate.observe", never)
    for given in (path, str(path), kvquant_compile.Artifact.load(path)):
        model = kvquant_compile.optimize(tiny("llama"), calibration=given)
        assert same_tables(model, three)
        assert torch.equal(quantised(model), quantised(three))


class _Loader:
    """Iterable, without a length, as a DataLoader over a stream is."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        lambda ids: list(ids),
        lambda ids: [row.tolist() for row in ids],
        lambda ids: ids.int(),
        lambda ids: _Loader([{"input_ids": ids[:3], "labels": None}, {"input_ids": ids[3:]}]),
        lambda ids: torch.utils.data.DataLoader(list(ids), batch_size=3),
        lambda ids: [BatchEncoding({"input_ids": row.tolist()}) for row in ids],
        lambda ids: (row for row in ids),
    ],
    ids=["rows", "list", "numbers", "int32", "mappings", "loader", "encodings", "generator"],
)
def test_every_kind_of_calibration_gives_the_same_windows(
    three: PreTrainedModel, wrap: Callable[[torch.Tensor], Any]
) -> None:
    captured = installed(three).captured
    windows = calibration_windows(wrap(TEXT), None, captured, WindowSettings())
    assert torch.equal(torch.cat(windows), TEXT)


def test_a_loader_calibrates_as_its_tensor_does(three: PreTrainedModel) -> None:
    loader = torch.utils.data.DataLoader(list(TEXT), batch_size=3)
    assert same_tables(kvquant_compile.optimize(tiny("llama"), calibration=loader), three)


def test_texts_are_tokenised(three: PreTrainedModel) -> None:
    texts = ["".join(map(chr, row)) for row in TEXT.tolist()]

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    model = kvquant_compile.optimize(tiny("llama"), bits=3, calibration=texts, tokenizer=tokenizer)
    assert same_tables(model, three)


def test_sensitivity_none_never_runs_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.autograd, "grad", never)
    model = kvquant_compile.optimize(tiny("llama"), bits=3, calibration=TEXT, sensitivity="none")
    assert torch.isfinite(quantised(model)).all()
    with pytest.raises(AssertionError, match="gradient"):
        kvquant_compile.optimize(tiny("llama"), bits=3, calibration=TEXT)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_optimising_without_gradients_gives_the_same_tables(
    three: PreTrainedModel, mode: Callable[[], Any]
) -> None:
    model = tiny("llama")
    with mode():
        kvquant_compile.optimize(model, bits=3, calibration=TEXT)
    assert same_tables(model, three)


def test_sampled_windows_can_be_used_again(three: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimised = kvquant_compile.sample_calibration(three, windows=2, tokens=20, seed=4)
    plain = kvquant_compile.sample_calibration(tiny("llama"), windows=2, tokens=20, seed=4)
    assert [w.shape for w in plain] == [(1, 20), (1, 20)]
    assert all(torch.equal(a, b) for a, b in zip(plain, optimised, strict=True))
