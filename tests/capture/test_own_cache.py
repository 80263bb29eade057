"""Models with a cache class of their own: what it adds are states of the modules that use them."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import DynamicCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

import kvquant_compile
from kvquant_compile.capture import capture
from kvquant_compile.capture.leaves import Leaf
from kvquant_compile.capture.own_cache import own_cache, own_states
from kvquant_compile.errors import CacheError, UnsupportedModelError
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.validate import validate_lossless
from tests.survey.case import build

OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def _ids(batch, tokens):
    return torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(0))


def test_modules_that_use_what_the_class_adds_are_leaves():
    captured = capture(build("minimax"))
    assert captured.caches.own is MiniMaxCache
    leaves = [m.module for m in captured.graph_module.children() if isinstance(m, Leaf)]
    assert any(isinstance(leaf, MiniMaxLightningAttention) for leaf in leaves)
    layers = recognise(captured)
    assert [(layer.plan.index, bool(layer.plan.rope)) for layer in layers] == [(0, True)]
    assert max(validate_lossless(captured, layers).values()) < 1e-5


def test_states_follow_their_rows(monkeypatch):
    model, ids = build("minimax"), _ids(2, 12)
    inherited = MiniMaxCache.reorder_cache

    def with_states(self, rows):  # transformers' own leaves the states behind
        inherited(self, rows)
        kept = self.linear_cache
        self.linear_cache = [x[rows] if isinstance(x, torch.Tensor) else x for x in kept]

    monkeypatch.setattr(MiniMaxCache, "reorder_cache", with_states)
    expected = model.generate(ids, **OPTIONS), model.generate(ids, num_beams=3, **OPTIONS)
    kvquant_compile.optimize(model, bits=16, progress=False)
    assert torch.equal(model.generate(ids, **OPTIONS), expected[0])
    assert torch.equal(model.generate(ids, num_beams=3, **OPTIONS), expected[1])
    with torch.no_grad():
        cache = model(ids).past_key_values
    assert [tuple(tensor.shape) for _, tensor in own_states(cache.states)] == [(2, 4, 16, 16)]
    assert cache.nbytes() >= own_states(cache.states)[0][1].nbytes


def test_such_a_cache_is_not_saved(tmp_path):
    model = kvquant_compile.optimize(build("minimax"), bits=16, progress=False)
    with torch.no_grad():
        cache = model(_ids(1, 4)).past_key_values
    with pytest.raises(CacheError, match="class of its own, MiniMaxCache"):
        cache.save(tmp_path / "cache.safetensors")


class _Added(DynamicCache):
    """Adds a tensor [B, 4] and a method that gives it."""

    state = None

    def fill(self, hidden):
        self.state = torch.zeros(len(hidden), 4)


class _Grows(_Added):
    def fill(self, hidden):
        self.state = hidden


class _Transposed(_Added):
    def fill(self, hidden):
        self.state = torch.zeros(4, len(hidden))


class _Counts(_Added):
    def fill(self, hidden):
        super().fill(hidden)
        self.seen = hidden.shape[1]


class _Lengthens(_Added):
    def fill(self, hidden):
        self.state = [torch.zeros(len(hidden)) for _ in range(hidden.shape[1])]


class _Empty(_Added):
    def fill(self, hidden):
        pass


class _Updates(_Added):
    def update(self, *args, **kwargs):
        return super().update(*args, **kwargs)


class _Needs(_Added):
    def __init__(self, size):
        super().__init__()


class _Alien:
    def fill(self, hidden):
        self.state = torch.zeros(len(hidden), 4)


def _backbone(kind):
    """What makes caches of a class, as a backbone does."""

    class Backbone:
        config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(hidden_size=8))

        def __call__(self, inputs_embeds, use_cache):
            cache = kind(4) if kind is _Needs else kind()
            if isinstance(cache, (_Added, _Alien)):
                cache.fill(inputs_embeds)
            return types.SimpleNamespace(past_key_values=cache)

    return Backbone()


def test_a_class_that_adds_states_of_fixed_size_is_taken():
    like = torch.zeros(())
    assert own_cache(_backbone(_Added), like) is _Added
    assert own_cache(_backbone(DynamicCache), like) is None


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (_Grows, "a tensor state that grows"),
        (_Transposed, "not one row per sequence"),
        (_Counts, "counts tokens in seen"),
        (_Lengthens, "holds more with more tokens"),
        (_Empty, "no tensors beside keys and values"),
        (_Updates, "a method update of its own"),
        (_Needs, "cannot be made empty"),
        (_Alien, "is no DynamicCache"),
    ],
)
def test_a_class_that_does_more_is_refused(kind, why):
    with pytest.raises(UnsupportedModelError, match=why):
        own_cache(_backbone(kind), torch.zeros(()))
