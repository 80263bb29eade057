"""What an optimised model refuses: an error of ours, before a token runs, and the model intact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

import kvquant_compile
from kvquant_compile import CacheError, OptionError
from tests.generate.models import generate, lossless
from tests.zoo import tiny, tokens

OPTIONS: dict[str, dict[str, Any]] = {
    "static cache": {"cache_implementation": "static"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "offloaded static cache": {"cache_implementation": "offloaded_static"},
    "quantized cache": {"cache_implementation": "quantized"},
    "paged cache": {"cache_implementation": "paged"},
    "cache_config": {"cache_config": {"nbits": 4}},
    "max_cache_len": {"max_cache_len": 99},
    "compile_config": {"compile_config": CompileConfig()},
    "early exit": {"assistant_early_exit": 1},
    "attentions": {"output_attentions": True},
    "hidden states": {"output_hidden_states": True},
}
HUB = {
    "diverse beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
    "constrained beams": {"num_beams": 2, "force_words_ids": [[5, 6]]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_refused(option: str) -> None:
    original, model = lossless()
    if option == "max_cache_len" and not hasattr(GenerationConfig(), "max_cache_len"):
        pytest.skip("this transformers has no max_cache_len")
    with pytest.raises(OptionError, match="optimised model"):
        generate(model, tokens(1, 20), **OPTIONS[option])
    expected, got = (generate(m, tokens(1, 20)) for m in (original, model))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", HUB)
def test_mode_that_transformers_moved_to_the_hub(mode: str) -> None:
    """transformers itself asks for leave to run code from the hub, before anything of ours runs."""
    for model in lossless():
        with pytest.raises(ValueError, match="trust_remote_code"):
            generate(model, tokens(), **HUB[mode])


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_foreign_cache_is_refused_by_generate(kind: type) -> None:
    model = lossless()[1]
    size = {"max_cache_len": 64} if kind is StaticCache else {}
    with pytest.raises(OptionError, match=kind.__name__):
        generate(model, tokens(), past_key_values=kind(config=model.config, **size))


@pytest.mark.parametrize("entry", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused(entry: str) -> None:
    original, model = lossless()
    if not hasattr(original, entry):
        pytest.skip("this transformers has no continuous batching")
    arguments: list = [[[5, 6, 7]]] if entry == "generate_batch" else []
    with pytest.raises(OptionError, match="continuous batching"):
        getattr(model, entry)(*arguments)


def test_restored_models_batch_continuously_again() -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits=16, progress=False)
    refused = model.init_continuous_batching
    kvquant_compile.restore(model)
    assert model.init_continuous_batching is not refused
    assert "init_continuous_batching" not in model.__dict__


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_asked_for_by_the_config_are_refused(name: str) -> None:
    model = kvquant_compile.optimize(tiny("llama"), bits=16, progress=False)
    model.config._attn_implementation = "eager"
    setattr(model.config, name, True)
    with pytest.raises(OptionError, match=name):
        model(tokens())


def test_packed_sequences_are_refused() -> None:
    model, positions = lossless()[1], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    ids = tokens(1, 8)
    expected = lossless()[0](ids, position_ids=positions, use_cache=False).logits
    with torch.no_grad():
        kept_apart = model(ids, position_ids=positions, use_cache=False).logits
        assert torch.equal(kept_apart, expected)
        with (
            kvquant_compile.quantised_attention(model),
            pytest.raises(OptionError, match="several sequences"),
        ):
            model(ids, position_ids=positions, use_cache=False)


def test_three_dimensional_positions_are_refused() -> None:
    with pytest.raises(OptionError, match="3 axes"):
        lossless()[1](tokens(), position_ids=torch.zeros(3, 2, 12, dtype=torch.int64))


def test_inputs_that_the_graph_does_not_have_are_refused() -> None:
    model, ids = kvquant_compile.optimize(tiny("gpt2"), bits=16, progress=False), tokens(1, 8)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model(ids, token_type_ids=None, labels=ids).logits, expected)
        kvquant_compile.restore(model)
        assert not torch.allclose(model(ids, token_type_ids=torch.ones_like(ids)).logits, expected)
        kvquant_compile.optimize(model, bits=16, progress=False)
    with pytest.raises(OptionError, match="token_type_ids given to an optimised model"):
        model(ids, token_type_ids=torch.ones_like(ids))
    with pytest.raises(OptionError, match="encoder_hidden_states"):
        model(ids, encoder_hidden_states=torch.zeros(1, 4, 64))


def test_a_layer_is_not_moved_on_its_own() -> None:
    model = lossless()[1]
    with torch.no_grad():
        cache = model(tokens(2, 70)).past_key_values
    before = cache.get_seq_length()
    for change in (
        lambda layer: layer.reset(),
        lambda layer: layer.crop(-1),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0])),
        lambda layer: layer.offload(),
        lambda layer: layer.prefetch(),
    ):
        with pytest.raises(CacheError, match="one layer"):
            change(cache.layers[0])
    assert cache.get_seq_length() == before
