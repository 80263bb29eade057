"""``recent_window=`` through whole models: steps, evaluation, files, reports."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.errors import OptionError
from kvquant_compile.runtime.installed import installed
from tests.zoo import tiny, tokens

OPTIONS = {"calibration": tokens(4, 64, seed=7), "sensitivity": "none", "progress": False}


@functools.cache
def optimised(recent: int, name: str = "llama") -> PreTrainedModel:
    return kvquant_compile.optimize(tiny(name), 2, recent_window=recent, **OPTIONS)


def in_steps(model: PreTrainedModel, ids: Tensor, steps: list[int]) -> Tensor:
    cache = kvquant_compile.new_cache(model)
    with torch.no_grad():
        return torch.cat([model(x, past_key_values=cache).logits for x in ids.split(steps, 1)], 1)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_window_over_everything_is_the_original(name: str) -> None:
    ids = tokens(1, 80, seed=1)
    with torch.no_grad():
        expected = tiny(name)(ids).logits
    for recent, low, high in ((96, 0, 1e-4), (0, 1e-2, 1)):
        model = optimised(recent, name)
        assert low <= error(in_steps(model, ids, [20, 1, 1, 10, 48]), expected) <= high
        with kvquant_compile.quantised_attention(model), torch.no_grad():
            assert low <= error(model(ids).logits, expected) <= high


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_evaluation_in_one_pass_is_what_decoding_does(name: str) -> None:
    """One pass over a text gives every query the exact tokens that it would have had, one token
    after the other."""
    model, ids = optimised(16, name), tokens(1, 90, seed=2)
    one_by_one = in_steps(model, ids, [1] * 90)
    with kvquant_compile.quantised_attention(model), torch.no_grad():
        assert error(model(ids).logits, one_by_one) < 1e-4
        assert error(in_steps(model, ids[:, :16], [16]), one_by_one[:, :16]) < 1e-4


def test_more_exact_tokens_are_nearer_to_the_original() -> None:
    ids = tokens(2, 100, seed=3)
    with torch.no_grad():
        expected = tiny("llama")(ids).logits
        errors = []
        for recent in (0, 16, 96):
            model = optimised(recent)
            with kvquant_compile.quantised_attention(model):
                errors.append(error(model(ids).logits, expected))
    assert errors == sorted(errors, reverse=True)


def test_generation_crops_forks_and_files(tmp_path: Path) -> None:
    model, prompt = optimised(16), tokens(2, 40, seed=4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = kvquant_compile.new_cache(model)
    out = model.generate(prompt, past_key_values=cache, **options)
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvquant_compile.load_cache(tmp_path / "cache.safetensors", model)
    fork, step = cache.fork(), out[:, -1:]
    with torch.no_grad():
        logits = [model(step, past_key_values=c).logits for c in (cache, loaded, fork)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    for each in (cache, loaded, fork):
        each.crop(-6)
        assert model.generate(prompt, past_key_values=each, **options).shape == out.shape


def test_bytes_are_predicted_and_reported() -> None:
    plain, ringed = optimised(0), optimised(16)
    ids = tokens(2, 64, seed=5)
    caches = [kvquant_compile.new_cache(model) for model in (plain, ringed)]
    with torch.no_grad():
        for model, cache in zip((plain, ringed), caches, strict=True):
            model(ids, past_key_values=cache)
    layouts = [layer.layout for layer in caches[1].pages]
    extra = sum(x.heads * 17 * x.exact_width * x.itemsize for x in layouts)
    assert caches[1].nbytes() - caches[0].nbytes() == 2 * extra
    assert caches[1].effective_bits() > caches[0].effective_bits()
    report = kvquant_compile.memory_report(ringed, context=64, batch=2, workspace=False)
    assert report.bytes("cache") == caches[1].nbytes()
    explained = kvquant_compile.explain(ringed)
    assert (explained.recent, kvquant_compile.explain(plain).recent) == (16, 0)
    assert "up to 16 last ones" in str(explained)


def test_artifacts_carry_it(tmp_path: Path) -> None:
    model = optimised(16)
    kvquant_compile.artifact(model).save(tmp_path / "ringed.safetensors")
    again = kvquant_compile.optimize(
        tiny("llama"), calibration=str(tmp_path / "ringed.safetensors")
    )
    layouts = [[str(x) for x in installed(m).program.layouts] for m in (model, again)]
    assert layouts[0] == layouts[1]
    assert all(text.endswith(" recent16") for text in layouts[0])
    plain = kvquant_compile.artifact(optimised(0))
    plain.save(tmp_path / "plain.safetensors")
    assert b"recent" not in (tmp_path / "plain.safetensors").read_bytes()
    wider = {i: dataclasses.replace(s, recent_tokens=32) for i, s in plain.specs.items()}
    widened = dataclasses.replace(plain, specs=wider)
    assert kvquant_compile.explain(
        kvquant_compile.optimize(tiny("llama"), calibration=widened)
    ).recent == 32  # fmt: skip


@pytest.mark.parametrize("value", [-16, 8, 1040, 16.0, True, "16"])
def test_wrong_sizes_are_refused(value: object) -> None:
    with pytest.raises(OptionError, match="recent_window"):
        kvquant_compile.optimize(tiny("llama"), recent_window=value)


def test_recipes_say_it_themselves() -> None:
    with pytest.raises(OptionError, match="Tail"):
        kvquant_compile.optimize(tiny("llama"), recipe="kivi", recent_window=16)
