"""Every bad input: one clear exception of ours before anything changed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel

import kvquant_compile
from kvquant_compile import (
    ArtifactError,
    CalibrationError,
    KVQuantError,
    OptionError,
    UnsupportedLayerError,
    UnsupportedModelError,
)
from kvquant_compile.capture import capture
from kvquant_compile.passes.recognise import recognise
from tests.zoo import VOCAB, decoder, tiny, tokens, unproved

TEXT = tokens(4, 64, seed=7)
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def generated(model: Any) -> torch.Tensor:
    return model.generate(tokens(1, 9), max_new_tokens=5, do_sample=False, pad_token_id=0)


def attributes(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Every module's own attributes, its parameters and submodules by identity."""
    return [
        (module, {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]


def same_attributes(before: list, after: list) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        return a is b or (not isinstance(a, (torch.Tensor, nn.Module)) and a == b)

    return len(before) == len(after) and all(
        m is n and same(a, b) for (m, a), (n, b) in zip(before, after, strict=True)
    )


class Untouched:
    """Asserts that an attempt raises, and that the model is as it was."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.text = generated(model)

    def refuses(self, kind: type[KVQuantError], match: str, **options: Any) -> None:
        model = self.model
        before, config = attributes(model), model.config.to_dict()
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        implementation = model.config._attn_implementation
        with pytest.raises(kind, match=match) as caught:
            kvquant_compile.optimize(model, **options)
        error = caught.value
        assert error.what
        assert error.why
        assert error.do
        assert same_attributes(before, attributes(model))
        assert model.config.to_dict() == config
        assert model.config._attn_implementation == implementation
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name])
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert torch.equal(generated(model), self.text)


@pytest.fixture(scope="module")
def llama() -> Untouched:
    return Untouched(tiny("llama"))


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = kvquant_compile.optimize(tiny("llama"), bits=2, calibration=TEXT)
    path = tmp_path_factory.mktemp("artifact") / "tables.safetensors"
    kvquant_compile.artifact(model).save(path)
    return path


def test_the_artifact_of_another_model(llama: Untouched, saved: Path) -> None:
    other = Untouched(tiny("llama", seed=1))
    other.refuses(ArtifactError, "another model", calibration=saved)
    wider = Untouched(tiny("llama", hidden_size=32))
    wider.refuses(ArtifactError, "another model", calibration=str(saved))


def test_a_missing_artifact(llama: Untouched, tmp_path: Path) -> None:
    llama.refuses(ArtifactError, "does not exist", calibration=tmp_path / "no.safetensors")
    llama.refuses(ArtifactError, "does not exist", calibration=str(tmp_path / "no.safetensors"))


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.99])
def test_a_truncated_artifact(llama: Untouched, saved: Path, tmp_path: Path, kept: float) -> None:
    content, path = saved.read_bytes(), tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    llama.refuses(ArtifactError, "damaged", calibration=path)


@pytest.mark.parametrize("part", range(8))
def test_an_artifact_with_a_flipped_byte(
    llama: Untouched, saved: Path, tmp_path: Path, part: int
) -> None:
    content, path = bytearray(saved.read_bytes()), tmp_path / "flipped.safetensors"
    content[20 + part * (len(content) - 21) // 7] ^= 1
    path.write_bytes(content)
    llama.refuses(ArtifactError, "damaged|cannot be used", calibration=path)


@pytest.mark.parametrize("change", [{"version": "1"}, {"kind": "weights"}, {"checksum": "0"}])
def test_an_artifact_of_another_kind_or_version(
    llama: Untouched, saved: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    with safe_open(saved, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata=metadata | change)
    llama.refuses(ArtifactError, "damaged|version", calibration=path)


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
