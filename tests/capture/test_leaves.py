"""Hybrid models: layers with a recurrent state stay the model's own modules."""

from __future__ import annotations

import copy

import pytest
import torch

import kvquant_compile
from kvquant_compile.capture import capture
from kvquant_compile.capture.leaves import Leaf
from kvquant_compile.capture.run import run_marked
from kvquant_compile.errors import CacheError
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.installed import installed
from kvquant_compile.runtime.validate import validate_lossless
from tests import zoo
from tests.survey.case import build

HYBRIDS = ("qwen3_next", "jamba", "falcon_h1", "lfm2")


@pytest.fixture(scope="module")
def optimised():
    model = build("qwen3_next")
    text = torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    return kvquant_compile.optimize(model, bits=8, calibration=text, sensitivity="none")


def _logits(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_hybrids_are_rewritten_and_validated(model_type):
    captured = capture(build(model_type))
    assert any(isinstance(m, Leaf) for m in captured.graph_module.children())
    layers = recognise(captured)
    assert layers
    assert max(validate_lossless(captured, layers).values()) < 1e-5


def test_the_graph_is_right_far_beyond_the_chunk_that_it_was_traced_in():
    captured = capture(build("qwen3_next"))
    hidden = torch.randn(1, 150, 64, generator=torch.Generator().manual_seed(0))
    positions, mask = torch.arange(150)[None], torch.ones(1, 150, dtype=torch.long)
    with torch.no_grad():
        got = run_marked(captured.graph_module, {}, hidden, mask, positions, 0)
        expected = captured.backbone(inputs_embeds=hidden).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_capture_leaves_the_modules_as_they_were():
    model = build("jamba")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    capture(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_caches_do_not_share_states_and_beams_carry_them(optimised):
    ids = zoo.tokens(2, 9) % 100
    first = kvquant_compile.new_cache(optimised)
    once = _logits(optimised, ids, first)
    torch.testing.assert_close(_logits(optimised, ids, kvquant_compile.new_cache(optimised)), once)
    swapped = copy.deepcopy(first)
    swapped.reorder_cache(torch.tensor([1, 0]))
    step = ids[:, :1]
    straight = _logits(optimised, step, first)
    crossed = _logits(optimised, step.flip(0), swapped)
    torch.testing.assert_close(crossed.flip(0), straight)


def test_a_state_cannot_go_back(optimised):
    cache = kvquant_compile.new_cache(optimised)
    _logits(optimised, zoo.tokens(1, 5) % 100, cache)
    with pytest.raises(CacheError, match="recurrent state"):
        cache.crop(-1)
    cache.crop(0)


def test_states_count_as_bytes_and_not_as_bits_of_keys_and_values(optimised):
    cache = kvquant_compile.new_cache(optimised)
    _logits(optimised, zoo.tokens(1, 64) % 100, cache)
    states = [
        tensor
        for layer in cache.states.layers
        for name in ("conv_states", "recurrent_states")
        for tensor in getattr(layer, name, {}).values()
        if tensor is not None
    ]
    assert states
    elements = 64 * sum(
        layer.plan.kv_heads * (layer.plan.key_dim + layer.plan.value_dim)
        for layer in installed(optimised).layers
    )
    pages = cache.nbytes() - sum(t.nbytes for t in states)
    assert cache.effective_bits() == pytest.approx(8 * pages / elements)
