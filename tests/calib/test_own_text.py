"""The model's own text beside a given one: how much, and that it serves other texts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.calib import calibrate
from kvquant_compile.calib.calibrate import CalibrationOptions, batched, choose_windows
from kvquant_compile.calib.data import drawn
from kvquant_compile.capture import capture
from kvquant_compile.capture.captured import Captured
from kvquant_compile.progress import Progress
from tests.api.helpers import same_tables
from tests.zoo import tiny, tokens

DATA = tokens(12, 40, seed=1)


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(tiny("llama"))


def chosen(captured: Captured, data: Any = DATA, **options: Any) -> tuple[list[torch.Tensor], str]:
    with Progress(False) as bar:
        return choose_windows(captured, data, None, CalibrationOptions.make(**options), bar)


def test_three_quarters_of_the_tokens_are_the_models_own(captured: Captured) -> None:
    windows, source = chosen(captured, windows=8)
    assert [ids.shape for ids in windows] == [(1, 40)] * 8
    assert source == "given and sampled by the model"
    given = {tuple(row) for row in DATA.tolist()}
    assert [tuple(ids[0].tolist()) in given for ids in windows] == [True] * 2 + [False] * 6


@pytest.mark.parametrize(
    ("part", "windows", "given", "own"),
    [(0, 8, 8, 0), (0.25, 8, 6, 2), (0.75, 8, 2, 6), (0.5, 1, 1, 1), (0.9, 4, 1, 9),
     (0.5, 99, 12, 12)],
)  # fmt: skip
def test_how_much_is_taken_of_either(
    captured: Captured, part: float, windows: int, given: int, own: int
) -> None:
    found, source = chosen(captured, windows=windows, own_text=part)
    known = {tuple(row) for row in DATA.tolist()}
    is_given = [tuple(ids[0].tolist()) in known for ids in found]
    assert is_given == [True] * given + [False] * own
    assert source == ("given and sampled by the model" if own else "given")


def test_own_sequences_are_short_and_many() -> None:
    options = CalibrationOptions()
    own = options.own([torch.zeros(1, 2048)] * options.given.windows)
    assert (own.windows, own.tokens) == (96, 256)
    assert options.own([torch.zeros(1, 300), torch.zeros(1, 100)]).windows == 5


def test_a_model_of_unknown_vocabulary_takes_the_text_alone(
    captured: Captured, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calibrate, "vocabulary", lambda model: 0)
    with caplog.at_level(logging.WARNING):
        windows, source = chosen(captured, windows=4)
    assert (len(windows), source) == (1, "given")
    assert "vocabulary is not known" in caplog.text


def test_windows_of_one_length_are_observed_together() -> None:
    windows = [torch.full((1, n), i) for i, n in enumerate((8, 8, 8, 4, 4, 8))]
    groups = batched(windows, 16)
    assert [group.tolist() for group in groups] == [
        [[0] * 8, [1] * 8], [[2] * 8], [[3] * 4, [4] * 4], [[5] * 8]
    ]  # fmt: skip
    assert [len(group) for group in batched(windows, 1)] == [1] * 6, "one at least"


def error(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Divergence of an optimised model's logits, every token read from the cache."""
    with torch.no_grad():
        exact = tiny("llama")(ids).logits.log_softmax(-1)
        found = model(ids).logits.log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def test_tables_from_a_narrow_text_serve_others_with_it() -> None:
    narrow = tokens(8, 40, seed=2) % 5
    other = tokens(4, 60, seed=3)
    errors = {}
    for part in (0, 0.5):
        model = kvquant_compile.optimize(
            tiny("llama"), bits=2, calibration=narrow, own_text=part, attend_quantized=True
        )
        errors[part] = error(model, other)
        details = kvquant_compile.artifact(model).details
        assert details["source"] == ("given and sampled by the model" if part else "given")
    assert errors[0.5] < 0.8 * errors[0]


def test_the_same_seed_samples_the_same_text() -> None:
    options = {"bits": 2, "calibration": DATA, "windows": 2}
    first, again = (kvquant_compile.optimize(tiny("llama"), **options) for _ in range(2))
    alone = kvquant_compile.optimize(tiny("llama"), **options, own_text=0)
    assert same_tables(first, again)
    assert not same_tables(first, alone)


def test_tokens_are_drawn_by_their_chances() -> None:
    chances = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    torch.manual_seed(0)
    found = drawn(chances.expand(20_000, -1))
    assert found.shape == (20_000, 1)
    counts = found.flatten().bincount(minlength=6)
    assert (counts[chances == 0] == 0).all()
    assert torch.allclose(counts / 20_000, chances, atol=0.015)  # four deviations
