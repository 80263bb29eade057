"""The cache's contract: rows, lengths, bytes; equality pairs of one history told two ways."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.memory.formulas import layer_cache
from tests.zoo import tiny, tokens


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    calibration = tokens(8, 64, seed=7)
    return kvquant_compile.optimize(tiny("llama"), bits=3, calibration=calibration)


@pytest.fixture(scope="module")
def paged() -> PreTrainedModel:
    """Without exact last tokens: a cache is the same however its tokens came."""
    calibration = tokens(8, 64, seed=7)
    return kvquant_compile.optimize(tiny("llama"), bits=3, calibration=calibration, recent_window=0)


def run(model: PreTrainedModel, ids: torch.Tensor, cache=None, mask=None):
    with torch.no_grad():
        out = model(ids, past_key_values=cache, attention_mask=mask, use_cache=True)
    return out.logits[:, -1], out.past_key_values


def test_cropped_equals_never_appended(paged: PreTrainedModel) -> None:
    ids, more = tokens(2, 100), tokens(2, 3, seed=5)
    _, cropped = run(paged, torch.cat([ids, tokens(2, 50, seed=9)], 1))
    cropped.crop(-50)
    _, plain = run(paged, ids)
    assert cropped.get_seq_length() == plain.get_seq_length() == 100
    assert torch.equal(run(paged, more, cropped)[0], run(paged, more, plain)[0])


def test_crop_takes_padding_into_account(model: PreTrainedModel) -> None:
    ids = tokens(2, 80)
    mask = torch.ones_like(ids)
    mask[1, :75] = 0
    _, cache = run(model, ids, mask=mask)
    cache.crop(-10)
    assert cache.lengths.tolist() == [70, 0]


def test_reordered_equals_recomputed(model: PreTrainedModel) -> None:
    ids, more = tokens(3, 70), tokens(3, 1, seed=4)
    order = torch.tensor([2, 0, 0])
    _, cache = run(model, ids)
    cache.reorder_cache(order)
    _, fresh = run(model, ids[order])
    torch.testing.assert_close(run(model, more, cache)[0], run(model, more, fresh)[0])


def test_repeated_rows_go_their_own_way(model: PreTrainedModel) -> None:
    ids = tokens(1, 70)
    _, cache = run(model, ids)
    cache.batch_repeat_interleave(2)
    got, _ = run(model, tokens(2, 1, seed=4), cache)
    expected, _ = run(model, tokens(2, 1, seed=4)[1:], run(model, ids)[1])
    torch.testing.assert_close(got[1:], expected)


def test_padded_row_equals_row_alone(model: PreTrainedModel) -> None:
    ids = tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :31] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        alone = model(ids[1:, 31:], use_cache=True)
    torch.testing.assert_close(padded.logits[1:, 31:], alone.logits, rtol=1e-4, atol=1e-4)
    ours, theirs = padded.past_key_values.layers[0], alone.past_key_values.layers[0]
    pages = padded.past_key_values.table[1, :1].long()
    # The pages themselves are equal to the bit: quantisation is per token, layout per sequence.
    assert torch.equal(ours.slabs[0][pages][0], theirs.slabs[0][0])


def test_bytes_are_effective_bits_times_elements(model: PreTrainedModel) -> None:
    _, cache = run(model, tokens(2, 3 * PAGE_TOKENS))
    report = kvquant_compile.explain(model)
    layout = cache.layers[0].layout
    pages = 2 * 3 * layout.heads * layout.page_bytes
    assert all(sum(s.nbytes for s in x.slabs) == pages for x in cache.layers)
    assert report.bytes_per_token * 2 * 3 * PAGE_TOKENS == pages * len(cache.layers)
    shared = cache.table.nbytes + cache.positions.nbytes + cache.lengths.nbytes
    sinks = sum(2 * layer_cache(x.layout)[1] for x in cache.layers)
    assert cache.nbytes() == pages * len(cache.layers) + shared + sinks
    elements = 2 * 3 * PAGE_TOKENS * 2 * len(cache.layers) * layout.heads * layout.key_dim
    assert cache.effective_bits() == 8 * cache.nbytes() / elements


def test_growth_never_moves_a_page(model: PreTrainedModel) -> None:
    _, cache = run(model, tokens(1, 70))
    before = [slab.data_ptr() for slab in cache.layers[0].slabs]
    for seed in range(3):
        _, cache = run(model, tokens(1, 64, seed=seed), cache)
    assert [slab.data_ptr() for slab in cache.layers[0].slabs][: len(before)] == before


def test_a_failing_step_leaves_the_cache_usable(model: PreTrainedModel) -> None:
    _, cache = run(model, tokens(1, 70))
    with pytest.raises(kvquant_compile.CacheError):
        run(model, tokens(1, 2), cache, mask=torch.ones(1, 5))
    more = tokens(1, 2, seed=2)
    expected = run(model, more, run(model, tokens(1, 70))[1])[0]
    assert torch.equal(run(model, more, cache)[0], expected)


@pytest.mark.parametrize("count", [1, -200])
def test_crop_refuses_what_it_cannot_mean(model: PreTrainedModel, count: int) -> None:
    _, cache = run(model, tokens(1, 70))
    with pytest.raises(kvquant_compile.CacheError, match="crop"):
        cache.crop(count)


def test_wrong_batch_and_update_are_refused(model: PreTrainedModel) -> None:
    _, cache = run(model, tokens(2, 10))
    with pytest.raises(kvquant_compile.CacheError, match="batch of 3"):
        run(model, tokens(3, 1), cache)
    with pytest.raises(kvquant_compile.CacheError, match="updated"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_tokens_masked_after_the_fact_are_hidden_and_can_come_back(paged: PreTrainedModel) -> None:
    ids, more = tokens(1, 80), tokens(1, 1, seed=4)
    mask = torch.ones(1, 81)
    mask[0, 70:80] = 0
    positions = torch.tensor([[80]])
    answers = []
    for length in (80, 70):  # hidden behind, or never there
        _, cache = run(paged, ids[:, :length])
        with torch.no_grad():
            answers.append(
                paged(more, past_key_values=cache, position_ids=positions,
                      attention_mask=mask if length == 80 else None).logits
            )  # fmt: skip
        if length == 80:
            cache.crop(-1)
            back, _ = run(paged, more, cache, torch.ones(1, 81))
    torch.testing.assert_close(*answers)
    assert torch.equal(back, run(paged, more, run(paged, ids)[1])[0])


def test_padding_cannot_become_real(model: PreTrainedModel) -> None:
    mask = torch.ones(1, 10)
    mask[0, :3] = 0
    _, cache = run(model, tokens(1, 10), mask=mask)
    with pytest.raises(kvquant_compile.CacheError, match="contradicts"):
        run(model, tokens(1, 1), cache, torch.ones(1, 11))


def test_reset_frees_everything(model: PreTrainedModel) -> None:
    _, cache = run(model, tokens(1, 70))
    cache.reset()
    assert cache.nbytes() == 0
    assert torch.equal(run(model, tokens(1, 70), cache)[0], run(model, tokens(1, 70))[0])
