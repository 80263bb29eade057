"""Every bad input: one clear exception of ours before anything changed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel

import kvquant_compile
from kvquant_compile import (
    CalibrationError,
    KVQuantError,
    OptionError,
    UnsupportedLayerError,
    UnsupportedModelError,
)
from kvquant_compile.capture import capture
from kvquant_compile.passes.recognise import recognise
from tests.api.helpers import TEXT
from tests.api.untouched import Untouched, attributes, generated, same_attributes
from tests.zoo import VOCAB, decoder, tiny, tokens, unproved

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def tiny_bert() -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "intermediate_size": 48}  # fmt: skip
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **sizes)).eval()


def tiny_t5() -> PreTrainedModel:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1}
    return AutoModel.from_config(AutoConfig.for_model("t5", **sizes, num_heads=2)).eval()


@pytest.mark.parametrize(
    ("build", "kind", "match"),
    [
        (tiny_bert, UnsupportedModelError, "no decoder"),
        (tiny_t5, UnsupportedModelError, "encoder-decoder"),
        (lambda: nn.Linear(4, 4), OptionError, "example_inputs"),
        (lambda: decoder("SdpaDecoder"), OptionError, "example_inputs"),
        (lambda: tiny("llama").model, UnsupportedModelError, "no language-model head"),
    ],
    ids=["bert", "t5", "linear", "no-example-inputs", "no-head"],
)
def test_models_that_are_no_causal_lm(
    build: Callable[[], nn.Module], kind: type[KVQuantError], match: str
) -> None:
    model = build()
    before = attributes(model)
    with pytest.raises(kind, match=match):
        kvquant_compile.optimize(model, calibration=TEXT % 64)
    assert same_attributes(before, attributes(model))


@pytest.mark.parametrize("thing", ["a/model/path", None, 3, {"model": 1}, nn.Linear])
def test_things_that_are_no_module(thing: Any) -> None:
    with pytest.raises(OptionError, match=r"no torch\.nn\.Module"):
        kvquant_compile.optimize(thing)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 17}, "bits=17"),
        ({"bits": 9}, "from 1 to 8"),
        ({"bits": -3}, "bits=-3"),
        ({"bits": "x"}, "bits='x'"),
        ({"bits": 0.5}, r"bits=0\.5"),
        ({"bits": 3.0}, r"bits=3\.0"),
        ({"bits": "auto"}, "budget"),
        ({"bits": 3, "budget": 2.9}, "auto"),
        ({"bits": 2.5, "allocation": "x"}, "allocation"),
        ({"bits": True}, "bits=True"),
        ({"bits": (3, 16)}, "lossless"),
        ({"bits": (3, 2, 1)}, "bits="),
        ({"bits": {0: 3, 1: "x"}}, "bits='x'"),
        ({"slots": 9}, "slots=9"),
        ({"slots": (1, 9)}, r"slots=\(1, 9\)"),
        ({"slots": (1, 0, 0)}, r"slots=\(1, 0, 0\)"),
        ({"slots": -1}, "slots=-1"),
        ({"slots": True}, "slots=True"),
        ({"sinks": -1}, "sinks=-1"),
        ({"sinks": 65}, "sinks=65"),
        ({"sinks": 1.0}, "sinks=1"),
        ({"sensitivity": "x"}, "fisher, none"),
        ({"windows": 0}, "windows=0"),
        ({"windows": True}, "windows=True"),
        ({"windows": "x"}, "windows='x'"),
        ({"seed": "x"}, "seed='x'"),
        ({"own_text": 1}, "own_text=1"),
        ({"own_text": -0.1}, "own_text=-0.1"),
        ({"own_text": True}, "own_text=True"),
        ({"own_text": "half"}, "own_text='half'"),
    ],
    ids=str,
)
def test_options_are_refused_without_running_the_model(
    llama: Untouched, options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvquant_compile.api.capture", None)
    llama.refuses(OptionError, match, calibration=TEXT, **options)


@pytest.fixture
def quick(llama: Untouched, stages: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages before calibration, run once for all tests."""
    monkeypatch.setattr("kvquant_compile.api.capture", lambda *args: stages[0])
    monkeypatch.setattr("kvquant_compile.api.recognise", lambda *args: stages[1])
    monkeypatch.setattr("kvquant_compile.api.validate_lossless", lambda *args: {})


@pytest.fixture(scope="module")
def stages(llama: Untouched) -> tuple[Any, Any]:
    captured = capture(llama.model)
    return captured, recognise(captured)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("bits", "match"), [({0: 3}, "layer 1"), ({0: 3, 1: 3, 7: 2}, "7"), ({}, "layer 0")]
)
def test_bits_by_layer_must_name_exactly_the_layers(
    llama: Untouched, bits: dict[int, int], match: str
) -> None:
    llama.refuses(OptionError, match, bits=bits, calibration=TEXT)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "empty"),
        ("", "tokenizer"),
        (torch.empty(0), "empty"),
        (torch.empty(2, 0, dtype=torch.long), "empty"),
        ([torch.empty(0, dtype=torch.long)], "empty"),
        ("some text", "without a tokenizer"),
        (["some", "texts"], "without a tokenizer"),
        (torch.rand(2, 64), "float32, not token ids"),
        (torch.ones(64, dtype=torch.bool), "bool, not token ids"),
        (TEXT + VOCAB, "outside the model's vocabulary of 128"),
        (TEXT - VOCAB, "token id -.* outside"),
        (torch.tensor(5), "single number"),
        (list(range(3, 90)), "single number"),
        (tokens(1, 5), "no piece has 16 tokens"),
        (3, "it is a int"),
        ([None], "NoneType"),
        ([{"labels": TEXT}], "without input_ids"),
    ],
    ids=lambda x: "" if isinstance(x, str) else type(x).__name__,
)
def test_unusable_calibration(llama: Untouched, data: Any, match: str) -> None:
    llama.refuses(CalibrationError, match, calibration=data)


def test_unusable_calibration_through_every_stage(llama: Untouched) -> None:
    llama.refuses(CalibrationError, "outside the model", calibration=TEXT + VOCAB)


@pytest.mark.usefixtures("quick")
def test_an_empty_text_with_a_tokenizer(llama: Untouched) -> None:
    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    llama.refuses(CalibrationError, "empty", calibration="", tokenizer=tokenizer)


def test_an_already_optimised_model_keeps_its_tables() -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits=2, calibration=TEXT)
    before, text = kvquant_compile.artifact(model), generated(model)
    for module in (model, model.model, nn.Sequential(model)):
        with pytest.raises(OptionError, match="already optimised"):
            kvquant_compile.optimize(module, bits=3)
    assert kvquant_compile.artifact(model) is before
    assert torch.equal(generated(model), text)


def test_an_optimised_model_cannot_be_copied() -> None:
    import copy

    model = kvquant_compile.optimize(tiny("llama"), bits=16)
    with pytest.raises(OptionError, match="copied or pickled"):
        copy.deepcopy(model)
    kvquant_compile.restore(model)
    assert torch.equal(generated(copy.deepcopy(model)), generated(model))


def test_models_that_cannot_be_captured() -> None:
    Untouched(tiny("llama", rope_parameters=DYNAMIC)).refuses(UnsupportedModelError, "dynamic")


@pytest.fixture(scope="module")
def unproven() -> Iterator[Untouched]:
    return Untouched(unproved())


def test_a_norm_after_rope_is_refused_by_name(unproven: Untouched) -> None:
    unproven.refuses(UnsupportedLayerError, "layers 0, 1.*strict=False", calibration=TEXT)


def test_not_strict_warns_once_and_keeps_keys_rotated(unproven: Untouched) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = kvquant_compile.optimize(unproved(), bits=8, calibration=TEXT, strict=False)
    ours = [str(w.message) for w in caught if "kvquant_compile" in str(w.message)]
    assert len(ours) == 1
    assert "layers 0, 1" in ours[0]
    report = kvquant_compile.explain(model)
    assert [layer.rope for layer in report.layers] == ["kept", "kept"]
    assert all(layer.refusal for layer in report.layers)
    assert "keys kept rotated" in str(report)
    assert torch.equal(generated(model), unproven.text)


def test_a_rewrite_that_is_wrong_is_not_installed(
    llama: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvquant_compile.runtime.program as program

    honest = program.lower_layer

    def wrong(*args: Any) -> Any:
        constants = honest(*args)
        return dataclasses.replace(constants, frequencies=constants.frequencies * 1.01)

    monkeypatch.setattr(program, "lower_layer", wrong)
    llama.refuses(kvquant_compile.ValidationError, "differs from the original", bits=16)


def test_gradients_are_refused_where_they_are_asked_for() -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits=16)
    loss = model(tokens(2, 20), use_cache=True).logits.square().mean()
    with pytest.raises(OptionError, match="no gradient flows"):
        loss.backward()
    assert all(layer.self_attn.q_proj.weight.grad is None for layer in model.model.layers)
