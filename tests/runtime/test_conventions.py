"""Decoders that keep their cache themselves, or in an object: the same calls, packed pages."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvquant_compile
from kvquant_compile.runtime.installed import installed
from tests import inplace_decoders as decoders
from tests import zoo

IDS = zoo.tokens(2, 90, seed=6)
STEPS = (70, 1, 1, 3, 15)


@dataclass(frozen=True)
class Case:
    """A decoder, what it is traced with, and how a step is called."""

    decoder: str
    start: Callable[[], Any]
    past: Callable[[int, int, Any], Any]


def _number(done: int, count: int, cache: Any) -> Any:
    return done


def _positions(done: int, count: int, cache: Any) -> Any:
    return torch.arange(done, done + count)


def _object(done: int, count: int, cache: Any) -> Any:
    return cache


CASES = {
    "slices written": Case("ReferenceDecoder", int, _number),
    "positions written": Case("PositionsDecoder", lambda: torch.arange(6), _positions),
    "index_copy_": Case("IndexCopyDecoder", lambda: torch.arange(6), _positions),
    "scatter_": Case("ScatterDecoder", lambda: torch.arange(6), _positions),
    "growing object": Case("ObjectDecoder", decoders.GrowingCache, _object),
    "static object": Case("ObjectDecoder", lambda: decoders.StaticCache(1), _object),
}
SLOW = ("positions written", "scatter_", "growing object")
EACH = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
SOME = pytest.mark.parametrize("name", ["slices written", "static object"])


def make(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return zoo.randomise(getattr(decoders, case.decoder)(1)).eval()


def talk(model: nn.Module, case: Case, steps: tuple[int, ...] = STEPS, cache: Any = None) -> Tensor:
    """Logits of a conversation, [2, sum(steps), vocab]."""
    cache, done, parts = case.start() if cache is None else cache, 0, []
    with torch.no_grad():
        for count in steps:
            parts.append(model(IDS[:, done : done + count], case.past(done, count, cache)))
            done += count
    return torch.cat(parts, 1)


def optimised(case: Case, bits: int, **options: Any) -> nn.Module:
    example = (zoo.tokens(), case.start())
    return kvquant_compile.optimize(make(case), bits=bits, example_inputs=example, **options)


@functools.cache
def lossless(name: str) -> nn.Module:
    """Shared by tests, which must leave it optimised."""
    return optimised(CASES[name], 16)


@EACH
def test_lossless_equals_the_original(name: str) -> None:
    case = CASES[name]
    expected = talk(make(case), case)
    model = lossless(name)
    assert all(x.rope.endswith("16") for x in kvquant_compile.explain(model).layers)
    for _ in range(2):  # a second conversation begins anew
        torch.testing.assert_close(talk(model, case), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@SOME
def test_three_bits_are_close_and_not_equal(name: str) -> None:
    case = CASES[name]
    model = optimised(case, 3, calibration=zoo.tokens(4, 64, seed=7))
    expected = talk(make(case), case, (90,))
    with kvquant_compile.quantised_attention(model):
        got = talk(model, case, (90,))
    assert 1e-3 < float((got - expected).norm() / expected.norm()) < 0.3


@SOME
def test_going_back_forgets(name: str) -> None:
    case = CASES[name]
    model, original = lossless(name), make(case)
    cache, own = case.start(), case.start()
    with torch.no_grad():
        for network, kept in ((model, cache), (original, own)):
            network(IDS[:, :20], case.past(0, 20, kept))
            if hasattr(kept, "seen"):
                kept.seen = 12
        got = model(IDS[:, 30:34], case.past(12, 4, cache))
        expected = original(IDS[:, 30:34], case.past(12, 4, own))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_step_beyond_the_cache_is_refused() -> None:
    model = lossless("slices written")
    with torch.no_grad():
        model(IDS[:, :4], 0)
        with pytest.raises(kvquant_compile.CacheError, match="holds 4 tokens"):
            model(IDS[:, :1], 7)


def test_positions_that_are_not_consecutive_are_refused() -> None:
    model = lossless("index_copy_")
    with pytest.raises(kvquant_compile.CacheError, match="not consecutive"), torch.no_grad():
        model(IDS[:, :3], torch.tensor([0, 2, 3]))


def test_memory_of_the_models_own_buffers_is_freed_until_restored() -> None:
    case = CASES["slices written"]
    model = optimised(case, 3, calibration=zoo.tokens(4, 64, seed=7))
    attention = model.layers[0].attention
    assert attention.cache_k.shape == (4, 256, 2, 16)
    assert attention.cache_k.untyped_storage().nbytes() == 4
    talk(model, case)
    cache = installed(model).own_cache
    assert cache is not None
    assert cache.get_seq_length() == 90
    full = 2 * 2 * 90 * 2 * 16 * 4
    assert sum(slab.nbytes for layer in cache.pages for slab in layer.slabs) < full / 3
    kvquant_compile.restore(model)
    assert attention.cache_k.untyped_storage().nbytes() == 4 * 256 * 2 * 16 * 4
    torch.testing.assert_close(talk(model, case), talk(make(case), case), rtol=0, atol=0)


def test_saved_buffers_stay_in_the_state_dict() -> None:
    before = make(CASES["index_copy_"]).state_dict()
    for key, value in lossless("index_copy_").state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_callers_cache_object_keeps_shapes_and_counts() -> None:
    case = CASES["static object"]
    model, cache = lossless("static object"), decoders.StaticCache(1)
    talk(model, case, (9, 1), cache)
    assert cache.length() == 10
    assert cache.layers[0][0].shape == (2, 2, 256, 16)
    assert cache.layers[0][0].is_meta


@pytest.mark.slow
def test_a_growing_object_keeps_its_length() -> None:
    growing = decoders.GrowingCache()
    talk(lossless("growing object"), CASES["growing object"], (9, 1), growing)
    assert growing.length() == 10


@pytest.mark.slow
def test_a_filled_cache_object_runs_the_original() -> None:
    case, cache = CASES["growing object"], decoders.GrowingCache()
    original, model = make(case), lossless("growing object")
    with torch.no_grad():
        original(IDS[:, :9], cache)
        twin = copy.deepcopy(cache)
        with pytest.warns(UserWarning, match="original model"):
            got = model(IDS[:, 9:10], cache)
        assert torch.equal(got, original(IDS[:, 9:10], twin))


@pytest.mark.slow
def test_training_mode_runs_the_original_loudly() -> None:
    case = CASES["index_copy_"]
    model = optimised(case, 16).train()
    with pytest.warns(UserWarning, match="training mode"):
        got = talk(model, case, (9,))
    assert torch.equal(got, talk(make(case).train(), case, (9,)))


class _Forgetful(decoders.ReferenceDecoder):
    """Writes every step to the start of its cache: no cache of what was before."""

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        return super().forward(tokens, 0)


def test_a_cache_that_is_overwritten_is_refused() -> None:
    torch.manual_seed(0)
    model = zoo.randomise(_Forgetful(1)).eval()
    with warnings.catch_warnings(), pytest.raises(kvquant_compile.KVQuantError):
        kvquant_compile.optimize(model, bits=16, example_inputs=(zoo.tokens(), 0))


def test_what_is_no_convention_is_refused_with_the_three() -> None:
    class Stateless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(128, 8)

        def forward(self, ids: Tensor, start: int) -> Tensor:
            return self.embed(ids)

    with pytest.raises(kvquant_compile.UnsupportedModelError, match="0 tensors") as error:
        kvquant_compile.optimize(Stateless(), example_inputs=(zoo.tokens(), 0))
    assert "forward(ids, cache)" in error.value.do
