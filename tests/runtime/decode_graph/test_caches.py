"""What happens to a cache between two decode steps that run as one graph."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.runtime import decode_graph
from kvquant_compile.runtime.installed import installed
from tests.runtime.decode_graph.helpers import Forgetful, graphs, run, started
from tests.runtime.recording import Recording
from tests.zoo import tokens


def test_growth_of_a_plain_loop(llama: PreTrainedModel, backend: Recording) -> None:
    ids = tokens(1, 80)
    cache = None
    for i in range(80):
        logits, cache = run(llama, ids[:, i : i + 1], cache)
    assert backend.captures == 2
    with graphs(llama, Recording()):
        _, other = run(llama, ids[:, :79])
        assert torch.equal(cache.positions[:, :79], other.positions[:, :79])
    eager = None
    kvquant_compile.use_cuda_graphs(llama, False)
    try:
        for i in range(80):
            expected, eager = run(llama, ids[:, i : i + 1], eager)
    finally:
        kvquant_compile.use_cuda_graphs(llama, True)
    assert torch.equal(logits, expected)


def test_crop_between_steps(llama: PreTrainedModel, backend: Recording) -> None:
    cache = started(llama)
    plain = copy.deepcopy(cache)
    run(llama, tokens(1, 1, seed=30), cache)
    cache.crop(-1)
    replays = backend.replays
    got = run(llama, tokens(1, 1, seed=31), cache)[0]
    assert backend.replays == replays + 1
    assert torch.equal(got, run(llama, tokens(1, 1, seed=31), plain)[0])


def test_two_caches_alternate(llama: PreTrainedModel) -> None:
    def play() -> list[torch.Tensor]:
        caches = [started(llama, seed) for seed in (1, 2)]
        return [run(llama, tokens(1, 1, seed=i), caches[i % 2])[0] for i in range(6)]

    expected, backend = play(), Recording()
    with graphs(llama, backend):
        assert all(map(torch.equal, play(), expected))
    assert (backend.captures, backend.replays) == (2, 10)


def test_no_more_graphs_than_agreed(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graph, "MOST_GRAPHS", 1)
    backend = Forgetful()
    with graphs(llama, backend):
        first, second = started(llama, 1), started(llama, 2)
        assert backend.captures == 1
        del first
        gc.collect()
        run(llama, tokens(1, 1), second)
    assert backend.captures == 2


def test_what_the_user_kept_is_not_overwritten(llama: PreTrainedModel, backend: Recording) -> None:
    cache = started(llama)
    with torch.no_grad():
        kept = llama.model(tokens(1, 1), past_key_values=cache).last_hidden_state
        before = kept.clone()
        llama.model(tokens(1, 1, seed=9), past_key_values=cache)
    assert backend.replays == 4
    assert torch.equal(kept, before)


def test_a_reordered_and_a_repeated_cache(llama: PreTrainedModel, backend: Recording) -> None:
    order, step = torch.tensor([1, 1]), tokens(2, 1, seed=8)
    cache = started(llama, batch=2)
    plain = copy.deepcopy(cache)
    cache.reorder_cache(order)
    kvquant_compile.use_cuda_graphs(llama, False)
    plain.reorder_cache(order)
    expected = run(llama, step, plain)[0]
    kvquant_compile.use_cuda_graphs(llama, True)
    for _ in range(2):
        again = copy.deepcopy(cache)
        assert torch.equal(run(llama, step, again)[0], expected)
    cache.batch_repeat_interleave(2)
    wide = run(llama, step.repeat_interleave(2, 0), cache)[0]
    torch.testing.assert_close(wide[::2], expected)


def test_reordering_keeps_addresses_and_the_graph(
    llama: PreTrainedModel, backend: Recording
) -> None:
    cache = started(llama, batch=2)
    storage, captures = cache.storage, backend.captures
    cache.reorder_cache(torch.tensor([1, 0]))
    run(llama, tokens(2, 1), cache)
    assert cache.storage is storage
    assert backend.captures == captures


def test_a_failing_replay_changes_nothing(llama: PreTrainedModel, backend: Recording) -> None:
    cache = started(llama)
    length, lengths = cache.get_seq_length(), cache.lengths.clone()

    def interrupt() -> None:
        raise KeyboardInterrupt

    backend.interrupt = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(llama, tokens(1, 1, seed=5), cache)
    assert cache.get_seq_length() == length
    assert torch.equal(cache.lengths, lengths)
    backend.interrupt = lambda: None
    expected = run(llama, tokens(1, 1, seed=6), copy.deepcopy(cache))[0]
    assert torch.equal(run(llama, tokens(1, 1, seed=6), cache)[0], expected)


def test_a_graph_dies_with_its_cache(llama: PreTrainedModel) -> None:
    with graphs(llama, Forgetful()):
        cache = started(llama)
        graph = weakref.ref(next(iter(installed(llama).decode._seen.values())).graph)
        assert graph() is not None
        del cache
        gc.collect()
        assert graph() is None


def test_the_mask_costs_one_wait_a_step_and_is_checked(
    llama: PreTrainedModel, backend: Recording
) -> None:
    cache = started(llama, batch=2)
    replays = backend.replays
    mask = torch.ones(2, cache.columns + 1, dtype=torch.int64)
    run(llama, tokens(2, 1), cache, attention_mask=mask)
    assert backend.replays == replays + 1
    mask = torch.ones(2, cache.columns + 1, dtype=torch.int64)
    mask[1, 3] = 0  # hides a token: eager bookkeeping, then the same graph
    hidden = run(llama, tokens(2, 1, seed=3), copy.deepcopy(cache), attention_mask=mask)[0]
    assert torch.equal(run(llama, tokens(2, 1, seed=3), cache, attention_mask=mask)[0], hidden)
    assert backend.captures == 1
    with pytest.raises(kvquant_compile.CacheError, match="does not fit"):
        run(llama, tokens(2, 1), cache, attention_mask=mask)
