"""An optimised model's generate against the original's, losslessly: token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import kvquant_compile
from tests.zoo import tiny, tokens

TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "cohere", "phi3", "gpt2")
GREEDY: dict[str, Any] = {"max_new_tokens": 70, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=TYPES)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(original, lossless) of one architecture, same weights."""
    return tiny(request.param), kvquant_compile.optimize(tiny(request.param), bits=16)


@pytest.fixture(scope="module")
def llama() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny("llama"), kvquant_compile.optimize(tiny("llama"), bits=16)


def assert_same_text(pair: tuple, ids: torch.Tensor, **options: Any) -> None:
    outputs = []
    for model in pair:
        torch.manual_seed(0)
        outputs.append(model.generate(ids, **{**GREEDY, **options}))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("length", [1, 7, 130])
def test_greedy(pair: tuple, length: int) -> None:
    assert_same_text(pair, tokens(1, length), eos_token_id=None)


def test_left_padded_batch(pair: tuple) -> None:
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :13], mask[2, :39] = 0, 0
    assert_same_text(pair, ids, attention_mask=mask, eos_token_id=None)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "temperature": 0.8}, {"num_beams": 3}, {"num_return_sequences": 2,
     "do_sample": True}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}],
    ids=lambda o: "+".join(o),
)  # fmt: skip
def test_generation_modes(llama: tuple, options: dict[str, Any]) -> None:
    batch = 1 if "prompt_lookup_num_tokens" in options else 2
    assert_same_text(llama, tokens(batch, 20), **options)


def test_multi_turn_reuse_of_the_returned_cache(llama: tuple) -> None:
    texts = []
    for model in llama:
        first = model.generate(tokens(2, 9), return_dict_in_generate=True, **GREEDY)
        longer = torch.cat([first.sequences, tokens(2, 5, seed=3)], 1)
        texts.append(model.generate(longer, past_key_values=first.past_key_values, **GREEDY))
    assert torch.equal(*texts)


def test_streaming_one_token_at_a_time_equals_prefill(llama: tuple) -> None:
    ids, model = tokens(2, 90), llama[1]
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = None, []
        for i in range(ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_forward_keeps_types_and_class(llama: tuple) -> None:
    original, optimised = llama
    ids = tokens()
    with torch.no_grad():
        a, b = original(ids), optimised(ids)
    assert type(a) is type(b)
    assert type(optimised) is type(original)
    assert isinstance(b.past_key_values, kvquant_compile.QuantizedCache)
    assert original.state_dict().keys() == optimised.state_dict().keys()


def test_foreign_cache_runs_the_original_and_says_so(llama: tuple) -> None:
    model = llama[1]
    with pytest.warns(UserWarning, match="DynamicCache"), torch.no_grad():
        out = model(tokens(), past_key_values=DynamicCache(config=model.config))
    assert isinstance(out.past_key_values, DynamicCache)


def test_restore_brings_the_original_back() -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits=16)
    kvquant_compile.restore(model)
    assert isinstance(model(tokens()).past_key_values, DynamicCache)
    with pytest.raises(kvquant_compile.OptionError, match="not optimised"):
        kvquant_compile.explain(model)


def test_parameters_are_shared_not_copied() -> None:
    model = tiny("llama")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    kvquant_compile.optimize(model, bits=16)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    with torch.no_grad():
        first = model(tokens()).logits
        model.model.layers[0].self_attn.o_proj.weight.mul_(2)
        assert not torch.equal(model(tokens()).logits, first)


def test_training_mode_is_loud_and_exact(llama: tuple) -> None:
    original, optimised = llama
    optimised.train()
    try:
        with pytest.warns(UserWarning, match="training mode"):
            logits = optimised(tokens()).logits
        torch.testing.assert_close(logits, original(tokens()).logits)
    finally:
        optimised.eval()


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_what_the_fused_graph_cannot_give_is_refused(llama: tuple, name: str) -> None:
    with pytest.raises(kvquant_compile.OptionError, match=name):
        llama[1](tokens(), **{name: True})


def test_other_cache_implementations_are_refused(llama: tuple) -> None:
    with pytest.raises(kvquant_compile.OptionError, match="static"):
        llama[1].generate(tokens(), cache_implementation="static", **GREEDY)


def test_four_dimensional_masks_are_refused(llama: tuple) -> None:
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(kvquant_compile.OptionError, match=r"mask of shape \(2, 1, 12, 12\)"):
        llama[1](tokens(), attention_mask=mask)


def test_moving_the_model_afterwards_is_refused() -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits=16).to(torch.float64)
    with pytest.raises(kvquant_compile.UnsupportedModelError, match="moved"):
        model(tokens())
