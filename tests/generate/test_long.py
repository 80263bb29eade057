"""Long prompts in chunks, and positions beyond those that a model was trained for."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, modeling_rope_utils

import kvquant_compile
from kvquant_compile import OptionError, UnsupportedLayerError, UnsupportedModelError
from kvquant_compile.runtime.installed import installed
from tests.fuzz.machine import Injected, failing
from tests.generate.models import (
    assert_same_text,
    generate,
    left_padded,
    lossless,
    original,
    raw_pages,
    three_bits,
)
from tests.zoo import decoder, tiny, tokens

CHUNK = 16


@contextmanager
def chunked(model: PreTrainedModel, chunk: int | None = CHUNK) -> Iterator[list[int]]:
    """Steps longer than ``chunk`` are cut; yields the lengths of the steps that ran."""
    state, lengths = installed(model), []
    kept, run = state.prefill_chunk, state.decode.run

    def spy(inputs: Any, cache: Any, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(positions.shape[1])
        return run(inputs, cache, positions, *rest)

    state.prefill_chunk, state.decode.run = chunk, spy
    try:
        yield lengths
    finally:
        state.prefill_chunk = kept
        del state.decode.run


def _prompts(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    ids, mask = left_padded(50, 0, 21)
    return {
        "ids": {"inputs": tokens(2, 50)},
        "padded": {"inputs": ids, "attention_mask": mask},
        "beams": {"inputs": tokens(2, 50), "num_beams": 2},
        "embedded": {"inputs": None, "inputs_embeds": model.get_input_embeddings()(tokens(2, 50))},
        "prompt lookup": {"inputs": tokens(1, 50), "prompt_lookup_num_tokens": 3},
    }


@pytest.mark.parametrize("prompt", ["ids", "padded", "beams", "embedded", "prompt lookup"])
def test_long_prompts_are_cut_and_the_text_stays(prompt: str) -> None:
    first, model = lossless()
    options = _prompts(first)[prompt]
    ids = options.pop("inputs")
    expected = generate(first, ids, **options)
    with chunked(model) as lengths:
        got = generate(model, ids, **options)
    assert torch.equal(got, expected)
    assert lengths[:4] == [16, 16, 16, 2]
    assert max(lengths) == CHUNK


@pytest.mark.parametrize("prompt", ["ids", "padded", "embedded"])
def test_default_chunks_equal_chunks_by_option(prompt: str) -> None:
    """At 3 bits, where a chunk reads the ones before it quantised."""
    model = three_bits(recent=0)
    options = _prompts(model)[prompt]
    ids = options.pop("inputs")
    with chunked(model):
        by_default = generate(model, ids, **options)
    if prompt != "embedded":  # transformers' own chunks are of token ids
        assert torch.equal(by_default, generate(model, ids, prefill_chunk_size=CHUNK, **options))
    with kvquant_compile.quantised_attention(model):
        with chunked(model):
            cut = generate(model, ids, **options)
        assert torch.equal(cut, generate(model, ids, **options))


def test_forward_returns_all_logits() -> None:
    first, model = lossless()
    with torch.no_grad(), chunked(model) as lengths:
        got = model(tokens(2, 50)).logits
        torch.testing.assert_close(got, first(tokens(2, 50)).logits, rtol=1e-4, atol=1e-4)
    assert lengths == [16, 16, 16, 2]


def test_own_chunk_size_wins() -> None:
    model = three_bits()
    with chunked(model) as lengths:
        generate(model, tokens(1, 40), prefill_chunk_size=10)
    assert lengths[:4] == [10, 10, 10, 10]


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True, "16"])
def test_chunk_that_is_no_length_is_refused(chunk: Any) -> None:
    with pytest.raises(OptionError, match="prefill_chunk"):
        kvquant_compile.optimize(tiny("llama"), prefill_chunk=chunk)


def test_hand_written_decoders_are_cut() -> None:
    ids = tokens(2, 50)
    model = decoder("SdpaDecoder").eval()
    with torch.no_grad():
        expected = model(ids, None)[0]
    kvquant_compile.optimize(
        model, bits=16, example_inputs=(tokens(), None), prefill_chunk=CHUNK, progress=False
    )
    with torch.no_grad():
        got, cache = model(ids, None)
    assert cache.get_seq_length() == 50
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_step_that_fails_in_its_second_chunk_leaves_nothing() -> None:
    model = three_bits(recent=0)
    with torch.no_grad(), chunked(model, None):
        cache = model(tokens(2, 20)).past_key_values
    run, calls = installed(model).decode.run, []

    def second_fails(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise Injected
        return run(*args)

    with chunked(model), torch.no_grad():
        installed(model).decode.run = second_fails
        with pytest.raises(Injected):
            model(tokens(2, 40), past_key_values=cache)
    assert (len(calls), cache.get_seq_length(), cache.lengths.tolist()) == (2, 20, [20, 20])
    with torch.no_grad():
        fresh = model(tokens(2, 20)).past_key_values
        a, b = (model(tokens(2, 3), past_key_values=c).logits for c in (cache, fresh))
    assert torch.equal(a, b)


class _Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.slow
def test_work_space_does_not_grow_with_the_prompt() -> None:
    """Neither model, pages apart, nor attention makes a tensor of the prompt's length."""
    model, largest = three_bits(), []
    for length in (4200, 5400):
        with chunked(model, 64), _Largest() as seen:
            generate(model, tokens(1, length), max_new_tokens=2)
        largest.append(seen.elements)
    assert largest[0] == largest[1]


# -- positions


def test_positions_beyond_training_equal_the_originals() -> None:
    """RoPE goes on; tiny models are "trained" for 512."""
    assert_same_text(lossless(), tokens(1, 600), max_new_tokens=5)


def test_positions_beyond_a_learned_table_fail_as_in_the_original() -> None:
    first = original("gpt2")
    with raw_pages("gpt2") as model, torch.no_grad():
        assert_same_text((first, model), tokens(1, 500), max_new_tokens=12)
        with pytest.raises(IndexError):
            first(tokens(1, 513))
        cache = model(tokens(1, 512)).past_key_values
        with pytest.raises(IndexError):
            model(tokens(1, 1), past_key_values=cache)
        assert cache.get_seq_length() == 512


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
}  # fmt: skip
SWITCHED: dict[str, Any] = {
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
    "factor": 8.0,
}


def _scaled(rope_type: str, **parameters: Any) -> PreTrainedModel:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}
    more = {k: v for k, v in parameters.items() if k == "original_max_position_embeddings"}
    return tiny("llama", rope_parameters=rope, max_position_embeddings=256, **more)


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", SCALED)
def test_scaled_rope_equals_the_original_beyond_its_length(rope_type: str) -> None:
    model = kvquant_compile.optimize(
        _scaled(rope_type, **SCALED[rope_type]), bits=16, progress=False
    )
    pair = _scaled(rope_type, **SCALED[rope_type]), model
    for length in (60, 250, 300):
        assert_same_text(pair, tokens(1, length))


def test_dynamic_ntk_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match='rope_type is "dynamic"'):
        kvquant_compile.optimize(_scaled("dynamic", factor=2.0))


def test_longrope_is_refused_before_rope_and_equals_the_original_behind_it() -> None:
    """Its frequencies switch with the length; keys stored behind RoPE keep those they had."""
    if "torch.where" in inspect.getsource(modeling_rope_utils.dynamic_rope_update):
        # Older releases switch in Python: the rotary module is a leaf, and nothing is provable.
        with pytest.raises(UnsupportedLayerError, match="before RoPE"):
            kvquant_compile.optimize(_scaled("longrope", **SWITCHED), bits=16, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kvquant_compile.optimize(
            _scaled("longrope", **SWITCHED), bits=16, strict=False, progress=False
        )
    pair = _scaled("longrope", **SWITCHED), model
    for length in (50, 70):  # generation crosses the switch at 64, or starts behind it
        assert_same_text(pair, tokens(1, length), max_new_tokens=30)


def test_failing_helper_fails() -> None:
    with failing(three_bits(), "append", 1), pytest.raises(Injected):
        three_bits()(tokens())
