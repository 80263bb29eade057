"""What optimize takes, what it leaves alone, and what explain says about it."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, DynamicCache, PreTrainedModel

import kvquant_compile
from kvquant_compile.calib.data import WindowSettings, calibration_windows
from kvquant_compile.runtime.installed import installed
from tests.zoo import tiny, tokens

TEXT = tokens(4, 64, seed=7)
IDS = tokens(2, 70, seed=3)


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=True).logits


def quantised(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with kvquant_compile.quantised_attention(model):
        return logits(model, ids)


def tables(model: PreTrainedModel) -> dict[tuple[int, str], torch.Tensor]:
    return {
        (index, name): tensor
        for index, layer in kvquant_compile.artifact(model).tables.items()
        for name, tensor in layer.tensors().items()
    }


def same_tables(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    first, second = tables(a), tables(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def three() -> PreTrainedModel:
    return kvquant_compile.optimize(tiny("llama"), bits=3, calibration=TEXT)


@pytest.fixture(scope="module")
def original() -> torch.Tensor:
    return logits(tiny("llama"))


def test_more_bits_are_closer_and_larger(original: torch.Tensor) -> None:
    errors, sizes = [], []
    for bits in (1, 2, 3, 4, 5, 6, 7, 8):
        model = kvquant_compile.optimize(tiny("llama"), bits, calibration=TEXT)
        errors.append(float((quantised(model) - original).norm() / original.norm()))
        sizes.append(kvquant_compile.explain(model).bytes_per_token)
        layers = kvquant_compile.explain(model).layers
        assert {(x.key_bits, x.value_bits) for x in layers} == {(bits, bits)}
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert errors[0] > 0.05
    assert errors[-1] < 0.01


@pytest.mark.parametrize(
    ("bits", "widths"),
    [
        ((4, 2), [(4, 2), (4, 2)]),
        ([2, 5], [(2, 5), (2, 5)]),
        ({0: 2, 1: (4, 3)}, [(2, 2), (4, 3)]),
        ({0: 16, 1: 3}, [(16, 16), (3, 3)]),
        (16, [(16, 16), (16, 16)]),
    ],
    ids=str,
)
def test_pairs_and_widths_by_layer(
    bits: Any, widths: list[tuple[int, int]], original: torch.Tensor
) -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits, calibration=TEXT)
    layers = kvquant_compile.explain(model).layers
    assert [(x.key_bits, x.value_bits) for x in layers] == widths
    error = float((quantised(model) - original).norm() / original.norm())
    assert error < 1e-5 if bits == 16 else 1e-4 < error < 0.5


def test_slots_and_sinks_are_stored() -> None:
    plain, rich = (
        kvquant_compile.optimize(
            tiny("llama"), 2, calibration=TEXT, slots=slots, sinks=sinks, recent_window=0
        )
        for slots, sinks in ((0, 0), ((3, 2), 5))
    )
    assert [x.slots for x in kvquant_compile.explain(plain).layers] == ["0+0", "0+0"]
    assert [x.slots for x in kvquant_compile.explain(rich).layers] == ["3+2", "3+2"]
    assert [kvquant_compile.explain(m).sinks for m in (plain, rich)] == [0, 5]
    expected = logits(tiny("llama"))
    exact = (quantised(rich) - expected)[:, :5].norm() / expected[:, :5].norm()
    assert exact < 1e-5
    assert (quantised(plain) - expected)[:, 1:5].norm() / expected[:, 1:5].norm() > 1e-2


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


def test_a_model_with_dropout_in_training_mode_is_optimised_as_in_evaluation() -> None:
    one, other = tiny("gpt2"), tiny("gpt2").train()
    assert other.config.attn_pdrop > 0
    for model in (one, other):
        kvquant_compile.optimize(model, bits=2, windows=1)
    assert other.training
    assert same_tables(one, other)


def test_parameters_and_modes_stay_as_they_were() -> None:
    model = tiny("llama")
    model.lm_head.weight.requires_grad_(False)
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    kvquant_compile.optimize(model, bits=3, calibration=TEXT)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_optimising_without_gradients_gives_the_same_tables(
    three: PreTrainedModel, mode: Callable[[], Any]
) -> None:
    model = tiny("llama")
    with mode():
        kvquant_compile.optimize(model, bits=3, calibration=TEXT)
    assert same_tables(model, three)


def test_a_cache_filled_in_inference_mode_can_be_continued(three: PreTrainedModel) -> None:
    last = tokens(2, 1, seed=9)
    with torch.inference_mode():
        cache = three(IDS, use_cache=True).past_key_values
    with torch.no_grad():
        plain = three(IDS, use_cache=True).past_key_values
        expected = three(last, past_key_values=plain).logits
        assert torch.equal(three(last, past_key_values=cache).logits, expected)


def test_attend_quantized_is_the_same_switched_by_option_or_context(
    three: PreTrainedModel,
) -> None:
    always = kvquant_compile.optimize(
        tiny("llama"), calibration=kvquant_compile.artifact(three), attend_quantized=True
    )
    assert torch.equal(logits(always), quantised(three))
    assert not torch.equal(logits(three), quantised(three))
    with torch.no_grad():
        assert torch.equal(always(IDS, use_cache=False).logits, logits(always))


def test_the_context_ends_with_its_block(three: PreTrainedModel) -> None:
    before = logits(three)
    with pytest.raises(KeyError), kvquant_compile.quantised_attention(three):
        raise KeyError
    assert torch.equal(logits(three), before)
    with (
        pytest.raises(kvquant_compile.OptionError, match="not optimised"),
        kvquant_compile.quantised_attention(tiny("llama")),
    ):
        pass


def test_two_optimised_models_and_their_sibling_do_not_disturb_each_other(
    three: PreTrainedModel, original: torch.Tensor
) -> None:
    alone = quantised(three)
    sibling = tiny("llama")
    implementation = sibling.config._attn_implementation
    other = kvquant_compile.optimize(tiny("llama"), bits=1, calibration=TEXT)
    coarse = quantised(other)
    assert torch.equal(quantised(three), alone)
    assert torch.equal(quantised(other), coarse)
    assert not torch.equal(alone, coarse)
    assert torch.equal(logits(sibling), original)
    assert isinstance(sibling(IDS).past_key_values, DynamicCache)
    for model in (sibling, three, other):
        assert model.config._attn_implementation == implementation
    assert "forward" not in vars(sibling.model)
    assert type(sibling).forward is type(three).forward


def test_each_model_takes_its_own_cache_only(three: PreTrainedModel) -> None:
    with torch.no_grad():
        cache = three(IDS).past_key_values
        first = three(tokens(2, 1), past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(three(tokens(2, 1), past_key_values=cache).logits, first)


def test_restore_gives_a_hook_its_forward_back() -> None:
    model = tiny("llama")
    inner, calls = model.model.forward, []

    @functools.wraps(inner)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.model.forward = hooked
    kvquant_compile.restore(kvquant_compile.optimize(model, bits=16))
    assert model.model.forward is hooked
    calls.clear()
    logits(model)
    assert calls


def test_restore_then_optimise_again(original: torch.Tensor, three: PreTrainedModel) -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits=1, calibration=TEXT)
    kvquant_compile.restore(model)
    assert torch.equal(logits(model), original)
    kvquant_compile.optimize(model, bits=3, calibration=TEXT)
    assert same_tables(model, three)


def test_a_dropped_model_is_freed() -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits=16)
    program = weakref.ref(installed(model).program)
    weight = weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert program() is None
    assert weight() is None


def test_sampled_windows_can_be_used_again(three: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimised = kvquant_compile.sample_calibration(three, windows=2, tokens=20, seed=4)
    plain = kvquant_compile.sample_calibration(tiny("llama"), windows=2, tokens=20, seed=4)
    assert [w.shape for w in plain] == [(1, 20), (1, 20)]
    assert all(torch.equal(a, b) for a, b in zip(plain, optimised, strict=True))


def test_new_cache_is_empty_and_usable(three: PreTrainedModel) -> None:
    cache = kvquant_compile.new_cache(three)
    assert cache.nbytes() == 0
    with torch.no_grad():
        got = three(IDS, past_key_values=cache).logits
    assert torch.equal(got, logits(three))
    assert cache.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize(
    "asked", [{"bits": 4}, {"slots": 1}, {"sinks": 3}, {"recent_window": 0}], ids=str
)
def test_asking_for_another_format_than_the_artifacts_is_refused(asked: dict[str, int]) -> None:
    tables = kvquant_compile.artifact(
        kvquant_compile.optimize(tiny("llama"), bits=3, calibration=TEXT)
    )
    with pytest.raises(kvquant_compile.OptionError, match="another format"):
        kvquant_compile.optimize(tiny("llama"), calibration=tables, **asked)
    model = kvquant_compile.optimize(tiny("llama"), calibration=tables)
    assert kvquant_compile.artifact(model).specs == tables.specs
    agreed = kvquant_compile.optimize(tiny("llama"), bits=3, slots=(1, 0), calibration=tables)
    assert kvquant_compile.artifact(agreed).specs == tables.specs
