"""What optimize leaves as it was: the model itself, other models, caches."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import kvquant_compile
from kvquant_compile.runtime.installed import installed
from tests.api.helpers import IDS, TEXT, logits, quantised, same_tables
from tests.zoo import tiny, tokens


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


def test_a_cache_filled_in_inference_mode_can_be_continued(three: PreTrainedModel) -> None:
    last = tokens(2, 1, seed=9)
    with torch.inference_mode():
        cache = three(IDS, use_cache=True).past_key_values
    with torch.no_grad():
        plain = three(IDS, use_cache=True).past_key_values
        expected = three(last, past_key_values=plain).logits
        assert torch.equal(three(last, past_key_values=cache).logits, expected)


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


def test_new_cache_is_empty_and_usable(three: PreTrainedModel) -> None:
    cache = kvquant_compile.new_cache(three)
    assert cache.nbytes() == 0
    with torch.no_grad():
        got = three(IDS, past_key_values=cache).logits
    assert torch.equal(got, logits(three))
    assert cache.get_seq_length() == IDS.shape[1]


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
