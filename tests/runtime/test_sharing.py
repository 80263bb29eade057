"""Pages shared between sequences and caches: nobody sees what another one wrote."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.errors import CacheError
from kvquant_compile.memory.formulas import layer_cache
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.paging import separate
from tests.runtime.decode_graph.helpers import graphs
from tests.runtime.recording import Recording
from tests.zoo import tiny, tokens


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A table with pages in any cells, lengths, and ownership."""
    batch, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pages = draw(st.integers(1, 20))
    cells = st.integers(0, pages - 1)
    table = torch.tensor(draw(st.lists(cells, min_size=batch * width, max_size=batch * width)))
    sizes = st.integers(0, width * PAGE_TOKENS)
    lengths = torch.tensor(draw(st.lists(sizes, min_size=batch, max_size=batch)))
    first = lengths // PAGE_TOKENS
    table = table.view(batch, width).to(torch.int32)
    empty = torch.arange(width) > first[:, None]
    table[empty & torch.tensor(draw(st.booleans()))] = -1
    owned = draw(st.lists(st.booleans(), min_size=pages, max_size=pages))
    return table, first, lengths, torch.tensor(owned)


@given(tables())
@settings(max_examples=300, deadline=None)
def test_separated_cells_are_written_by_one_and_read_by_none(case: tuple) -> None:
    table, first, lengths, owned = case
    found = separate(table, first, lengths, owned)
    count = owned.numel()
    written = torch.arange(table.shape[1]) >= first[:, None]
    own = found.table[written].tolist()
    assert len(set(own)) == len(own), "every cell that is written has a page of its own"
    assert not set(own) & set(found.table[~written].tolist())
    assert torch.equal(found.table[~written], table[~written]), "what is only read stays"
    assert all(page >= count or owned[page] for page in own)
    assert sorted(page for page in own if page >= count) == list(
        range(count, count + found.missing)
    )
    reused = owned.sum() - len(
        {p for p in found.table.flatten().tolist() if p < count and owned[p]}
    )
    assert not found.missing or not reused, "no page is added while one is free"
    assert not set(found.sources.tolist()) & set(found.targets.tolist())
    content = torch.arange(table.shape[1]) * PAGE_TOKENS < lengths[:, None]
    moved = dict(zip(found.targets.tolist(), found.sources.tolist(), strict=True))
    for old, new in zip(table[content].tolist(), found.table[content].tolist(), strict=True):
        assert moved.get(new, new) == old, "tokens come along"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    network = tiny("llama", max_position_embeddings=4096)
    return kvquant_compile.optimize(network, bits=3, calibration=tokens(8, 64, seed=7))


def run(model: PreTrainedModel, ids: torch.Tensor, cache=None):
    with torch.no_grad():
        out = model(ids, past_key_values=cache, use_cache=True)
    return out.logits[:, -1], out.past_key_values


def pages(cache: QuantizedCache) -> int:
    return sum(slab.shape[0] for slab in cache.layers[0].slabs)


def test_continuations_hold_the_prompt_once(model: PreTrainedModel) -> None:
    _, cache = run(model, tokens(1, 40 * PAGE_TOKENS + 10))
    alone = pages(cache)
    family = cache.fork(8)
    assert pages(family) == alone + 8, "one page more for each"
    run(model, tokens(8, 30), family)
    assert pages(family) == alone + 8
    cache.batch_repeat_interleave(8)
    run(model, tokens(8, 30), cache)
    assert pages(cache) <= alone + 8 + 8 * (alone // 128), "a sixteenth of the prompt in reserve"
    (layout,) = {layer.layout for layer in family.layers}
    packed = pages(family) * layout.heads * layout.page_bytes * len(family.layers)
    row = 4 * (41 * PAGE_TOKENS + 41 + 1) + layer_cache(layout)[1] * len(family.layers)
    assert family.nbytes() == packed + 8 * row, "beside the pages: positions, table, sinks"


def test_forks_go_their_own_ways(model: PreTrainedModel) -> None:
    ids = tokens(2, 150)
    _, cache = run(model, ids)
    forks = [cache.fork(), copy.deepcopy(cache), cache.fork(2)]
    for _ in range(2):
        for seed, fork in enumerate([cache, *forks]):
            more = tokens(fork.batch, 40, seed=30 + seed)
            _, fresh = run(model, ids.repeat_interleave(fork.batch // 2, 0))
            run(model, more, fresh)
            run(model, more, fork)
            expected = run(model, tokens(fork.batch, 1, seed=5), fresh)[0]
            assert torch.equal(run(model, tokens(fork.batch, 1, seed=5), fork)[0], expected)
            fork.crop(-41)


def test_a_cropped_prompt_is_not_written_over(model: PreTrainedModel) -> None:
    ids = tokens(1, 3 * PAGE_TOKENS)
    _, cache = run(model, ids)
    fork = cache.fork()
    cache.crop(-100)
    run(model, tokens(1, 100, seed=3), cache)
    expected = run(model, tokens(1, 1), run(model, ids)[1])[0]
    assert torch.equal(run(model, tokens(1, 1), fork)[0], expected)
    cache.reset()
    fork.crop(-1)
    assert torch.equal(run(model, tokens(1, 1), fork)[0], expected)


def test_generation_from_a_shared_prompt(model: PreTrainedModel) -> None:
    prompt = tokens(1, 130)
    _, cache = run(model, prompt[:, :-1])
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fresh = run(model, prompt[:, :-1])[1]
    expected = model.generate(prompt, past_key_values=fresh, **options)
    for _ in range(2):
        got = model.generate(prompt, past_key_values=cache.fork(), **options)
        assert torch.equal(got, expected)
    torch.manual_seed(0)
    sampled = {**options, "do_sample": True}
    both = model.generate(prompt.expand(2, -1), past_key_values=cache.fork(2), **sampled)
    assert not torch.equal(both[0], both[1])


def test_beams_add_no_pages_and_read_what_they_wrote(model: PreTrainedModel) -> None:
    _, cache = run(model, tokens(4, 10 * PAGE_TOKENS + 5))
    _, copied = run(model, tokens(4, 10 * PAGE_TOKENS + 5))
    before = pages(cache)
    for step in range(55):
        order = torch.tensor([0, 0, step % 4, 1])
        cache.reorder_cache(order)
        for layer in copied.layers:  # the plainest way: every row with pages of its own
            for slab in layer.slabs:
                slab.copy_(slab.view(4, 11, *slab.shape[1:])[order].flatten(0, 1))
            layer.sinks.copy_(layer.sinks[order])
        got, _ = run(model, tokens(4, 1, seed=step), cache)
        expected, _ = run(model, tokens(4, 1, seed=step), copied)
        for either in (cache, copied) if step == 40 else ():
            either.crop(-3)
    assert torch.equal(got, expected)
    assert pages(cache) == before, "pages of beams that were given up serve the others"
    assert cache.table[0, 3] == cache.table[1, 3]


def test_fewer_sequences_free_their_pages(model: PreTrainedModel) -> None:
    _, cache = run(model, tokens(4, 3 * PAGE_TOKENS))
    fork = cache.fork()
    expected = run(model, tokens(1, 1), run(model, tokens(4, 3 * PAGE_TOKENS)[:1])[1])[0]
    cache = run(model, tokens(4, 3 * PAGE_TOKENS))[1]
    cache.batch_select_indices(torch.tensor([0]))
    fork.batch_select_indices(torch.tensor([0]))
    assert pages(cache) == 3
    assert torch.equal(run(model, tokens(1, 1), cache)[0], expected)
    assert torch.equal(run(model, tokens(1, 1), fork)[0], expected)


def test_exact_last_tokens_reach_pages_of_their_own() -> None:
    network = tiny("llama")
    options = {"recipe": "kivi", "bits": 4, "calibration": tokens(4, 64, seed=7)}
    model = kvquant_compile.optimize(network, **options)
    _, cache = run(model, tokens(1, 200))
    forks = cache.fork(2)
    more = tokens(2, 150, seed=5)
    _, forks = run(model, more, forks)
    for row in range(2):
        _, alone = run(model, tokens(1, 200))
        _, alone = run(model, more[row : row + 1], alone)
        expected = run(model, tokens(1, 1), alone)[0]
        only = forks.fork()
        only.batch_select_indices(torch.tensor([row]))
        assert torch.equal(run(model, tokens(1, 1), only)[0], expected)


def test_a_captured_step_goes_on_after_forks_and_beams(model: PreTrainedModel) -> None:
    backend = Recording()
    _, cache = run(model, tokens(2, 66))
    _, plain = run(model, tokens(2, 66))
    order = torch.tensor([1, 1])
    with graphs(model, backend):
        for step in range(40):
            if step % 10 == 5:
                cache.reorder_cache(order)
            fork = cache.fork() if step == 20 else None
            got, _ = run(model, tokens(2, 1, seed=step), cache)
        assert backend.captures == 1, "neither a fork nor beams move what the graph reads"
        del fork
    for step in range(40):
        if step % 10 == 5:
            plain.reorder_cache(order)
        expected, _ = run(model, tokens(2, 1, seed=step), plain)
    assert torch.equal(got, expected)


def test_saved_forks_share_on_disk_and_after(model: PreTrainedModel, tmp_path: Path) -> None:
    _, cache = run(model, tokens(1, 5 * PAGE_TOKENS + 3))
    cache.batch_repeat_interleave(3)
    cache.save(tmp_path / "c.safetensors")
    loaded = kvquant_compile.load_cache(tmp_path / "c.safetensors", model)
    assert pages(loaded) == 6
    more = tokens(3, 70, seed=3)
    run(model, more, loaded)
    run(model, more, cache)
    step = tokens(3, 1)
    assert torch.equal(run(model, step, loaded)[0], run(model, step, cache)[0])


def test_hybrids_fork_with_their_states() -> None:
    sizes = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    network = tiny("lfm2", num_key_value_heads=2, **sizes)
    model = kvquant_compile.optimize(network, bits=3, calibration=tokens(8, 64, seed=7))
    _, cache = run(model, tokens(1, 30))
    fork = cache.fork(2)
    expected = run(model, tokens(1, 2, seed=3), cache)[0]
    got = run(model, tokens(1, 2, seed=3).expand(2, -1), fork)[0]
    torch.testing.assert_close(got, expected.expand(2, -1))


def test_forks_of_nothing(model: PreTrainedModel) -> None:
    empty = kvquant_compile.new_cache(model)
    assert empty.fork(3).nbytes() == 0
    with pytest.raises(CacheError, match="0 times"):
        empty.fork(0)
