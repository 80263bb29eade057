"""Threads, failures in the middle of a step, and numbers that are none."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile import CacheError, QuantizedCache
from kvquant_compile.runtime.layer import QuantizedLayer
from kvquant_compile.runtime.paged import PagedStorage
from tests.fuzz.machine import Injected, failing
from tests.generate.models import generate, left_padded, original, raw_pages, three_bits
from tests.survey.case import build
from tests.zoo import tokens


def prefilled(model: PreTrainedModel, ids: torch.Tensor) -> QuantizedCache:
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


def logits(model: PreTrainedModel, cache: QuantizedCache, seed: int = 5) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(cache.batch, 3, seed=seed), past_key_values=cache).logits


def test_generations_in_threads_are_those_of_one_thread() -> None:
    model = three_bits()
    prompts = [tokens(1 + i % 2, 20 + 30 * i, seed=i) for i in range(3)]
    expected = [generate(model, ids) for ids in prompts]
    got: list[Any] = [None] * len(prompts)
    start = threading.Barrier(len(prompts))

    def work(i: int) -> None:
        start.wait()
        got[i] = generate(model, prompts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# -- failures


@pytest.mark.parametrize("op", ["append", "attend"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("length", [1, 64, 100])
def test_failed_step_leaves_the_cache_as_it_was(op: str, layer: int, length: int) -> None:
    model = three_bits(recent=0)
    cache = prefilled(model, tokens(2, 70))
    with failing(model, op, layer), pytest.raises(Injected), torch.no_grad():
        model(tokens(2, length, seed=9), past_key_values=cache)
    assert torch.equal(logits(model, cache), logits(model, prefilled(model, tokens(2, 70))))


def test_first_step_that_failed_leaves_an_empty_cache() -> None:
    model = three_bits()
    cache = kvquant_compile.new_cache(model)
    with failing(model, "attend", 0), pytest.raises(Injected), torch.no_grad():
        model(tokens(2, 9), past_key_values=cache)
    with torch.no_grad():  # another number of rows will do
        got = model(tokens(3, 9), past_key_values=cache).logits
    assert torch.equal(got, model(tokens(3, 9)).logits)


@pytest.mark.parametrize("pages", [1, 2])
def test_out_of_memory_while_growing_leaves_the_cache_as_it_was(pages: int) -> None:
    """The last layer's slab cannot be had when the others have theirs."""
    model = three_bits()
    cache = prefilled(model, tokens(2, 70))
    slab, calls = QuantizedLayer.new_slab, []

    def short(layer: QuantizedLayer, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == len(cache.layers):
            raise torch.OutOfMemoryError("simulated")
        return slab(layer, *args)

    with (
        mock.patch.object(QuantizedLayer, "new_slab", short),
        pytest.raises(torch.OutOfMemoryError),
        torch.no_grad(),
    ):
        model(tokens(2, 64 * pages, seed=9), past_key_values=cache)
    assert len(calls) == len(cache.layers)
    assert torch.equal(logits(model, cache), logits(model, prefilled(model, tokens(2, 70))))


def _reorder(cache: QuantizedCache) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def _crop(cache: QuantizedCache) -> None:
    cache.crop(-1)


def _copy(cache: QuantizedCache) -> None:
    copy.deepcopy(cache)


def _save(cache: QuantizedCache) -> None:
    cache.save("never-written.safetensors")


USES = [_reorder, _crop, _copy, _save]


@pytest.mark.parametrize("use", [*USES, None], ids=lambda use: getattr(use, "__name__", "step"))
def test_half_reordered_cache_says_so_until_it_is_reset(
    use: Callable[[QuantizedCache], None] | None,
) -> None:
    model = three_bits()
    cache = prefilled(model, tokens(2, 70))
    with mock.patch.object(PagedStorage, "select", side_effect=Injected), pytest.raises(Injected):
        _reorder(cache)
    with pytest.raises(CacheError, match="can no longer be used"):
        logits(model, cache) if use is None else use(cache)
    cache.reset()
    with torch.no_grad():
        again = model(tokens(2, 70), past_key_values=cache).past_key_values
    assert torch.equal(logits(model, again), logits(model, prefilled(model, tokens(2, 70))))


def test_failed_step_of_a_recurrent_model_leaves_a_cache_that_says_so() -> None:
    """The state of its first layers has gone on already."""
    model = kvquant_compile.optimize(build("lfm2"), bits=16, progress=False)
    cache = prefilled(model, tokens(2, 12))
    copied = copy.deepcopy(cache)
    with failing(model, "attend", 0), pytest.raises(Injected), torch.no_grad():
        model(tokens(2, 1), past_key_values=cache)
    with pytest.raises(CacheError, match="a step failed half way"):
        logits(model, cache)
    with torch.no_grad():
        model(tokens(2, 1), past_key_values=copied)


# -- numbers that are none


def _with_one(
    model: PreTrainedModel, ids: torch.Tensor, value: float, column: int = 5
) -> torch.Tensor:
    """Embedded tokens, of which one channel in a column of row 0 is ``value``."""
    embedded = model.get_input_embeddings()(ids).detach().clone()
    embedded[0, column, 3] = value
    return embedded


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [16, 3])
def test_numbers_that_are_none_show_in_their_row_and_stay_there(bits: int, value: float) -> None:
    """As the original's: from the token on, in later steps too, and in no other row."""

    def finite(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            embedded = _with_one(model, tokens(2, 12), value)
            first = model(inputs_embeds=embedded, use_cache=True)
            second = model(tokens(2, 3, seed=4), past_key_values=first.past_key_values)
        return tuple(out.logits.isfinite().all(-1) for out in (first, second))

    expected = finite(original())
    if bits == 3:
        got = finite(three_bits())
    else:
        with raw_pages("llama") as model:
            got = finite(model)
    assert not bool(expected[0][0, 5:].any())
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours[:, 5:], theirs[:, 5:])
        assert bool((ours | ~theirs).all()), "only where the original's are none"


@pytest.mark.parametrize("count", [1, 3, 30])
def test_numbers_that_are_none_go_with_the_tokens_that_are_cropped(count: int) -> None:
    model = three_bits(recent=0)
    with torch.no_grad():
        embedded = _with_one(model, tokens(2, 80), torch.nan)
        cache = prefilled(model, tokens(2, 4))
        model(inputs_embeds=embedded[:, 4:], past_key_values=cache)
        cache.crop(-76)
        more = tokens(2, count, seed=4)
        got = model(more, past_key_values=cache).logits
        expected = model(more, past_key_values=prefilled(model, tokens(2, 4))).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("count", [1, 3])
def test_nor_do_they_stay_in_a_ring(count: int) -> None:
    """Exact last tokens that a cropped step has overwritten come from the pages."""
    model = three_bits()
    with torch.no_grad():
        cache = prefilled(model, ids := tokens(2, 40))
        model(inputs_embeds=_with_one(model, tokens(2, 80), torch.nan), past_key_values=cache)
        cache.crop(-80)
        more = tokens(2, count, seed=4)
        got = model(more, past_key_values=cache).logits
        expected = model(more, past_key_values=prefilled(model, ids)).logits
    assert 0 < (got - expected).norm() < 0.3 * expected.norm()


def test_failed_step_costs_no_more_than_exact_tokens() -> None:
    model = three_bits()
    cache = prefilled(model, tokens(2, 70))
    with failing(model, "attend", 1), pytest.raises(Injected), torch.no_grad():
        model(tokens(2, 9, seed=9), past_key_values=cache)
    got, expected = logits(model, cache), logits(model, prefilled(model, tokens(2, 70)))
    assert 0 < (got - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("bits", [16, 3])
def test_they_go_from_shorter_rows_too(bits: int) -> None:
    """Row 0's slots behind its end are read with row 1's, and weighted with zero."""
    ids, mask = left_padded(80, 50, 0)
    more = torch.cat([mask[:, :60], torch.ones(2, 1, dtype=torch.int64)], 1)
    with (
        raw_pages("llama") if bits == 16 else contextlib.nullcontext(three_bits(recent=0)) as model
    ):
        embedded, answers = _with_one(model, ids, torch.nan, column=65), []
        for cropped in (True, False):
            with torch.no_grad():
                cache = model(ids[:, :60], attention_mask=mask[:, :60]).past_key_values
                if cropped:
                    rest = embedded[:, 60:]
                    model(inputs_embeds=rest, attention_mask=mask, past_key_values=cache)
                    cache.crop(-20)
                step = tokens(2, 1, seed=3)
                out = model(step, attention_mask=more, past_key_values=cache)
            answers.append(out.logits)
    assert torch.equal(*answers)
