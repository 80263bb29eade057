"""One history told two ways, on six architectures: losslessly and at 3 bits, token for token.

Where the two tell different steps apart (a chunk and the whole, one token and several), attention
reads everything from the packed cache: by default a step's own tokens are exact, and a longer step
has more of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvquant_compile import QuantizedCache, quantised_attention
from tests.generate.models import (
    ARCHITECTURES,
    Pair,
    assert_same_text,
    generate,
    left_padded,
    original,
    prompts,
    raw_pages,
    three_bits,
)

ORIGINALS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 7},
}


# By default lossless pages on two of them, where windows and soft-caps differ; all with ``--slow``.
USUAL = ("llama", "gemma2")
SLOW, SHARED = pytest.mark.slow, pytest.mark.shared
TRAINED = [("demo", [SLOW]), ("llama-63m", [SLOW, SHARED])]
LOSSLESS = [(kind, [] if kind in USUAL else [SLOW]) for kind in ARCHITECTURES] + TRAINED
THREE_BITS = [(kind, []) for kind in ARCHITECTURES] + TRAINED


@pytest.fixture(
    params=[
        pytest.param((kind, bits), marks=marks, id=f"{kind}-{bits}")
        for bits, kinds in ((16, LOSSLESS), (3, THREE_BITS))
        for kind, marks in kinds
    ]
)
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.fixture
def kind(case: tuple[str, int]) -> str:
    return case[0]


@pytest.fixture
def model(case: tuple[str, int]) -> Iterator[PreTrainedModel]:
    """Optimised, with pages of 16 or 3 bits."""
    kind, bits = case
    with raw_pages(kind) if bits == 16 else contextlib.nullcontext(three_bits(kind)) as model:
        yield model


@pytest.fixture
def paged(case: tuple[str, int]) -> Iterator[PreTrainedModel]:
    """The same without a ring, which depends on how tokens came."""
    kind, bits = case
    with raw_pages(kind) if bits == 16 else contextlib.nullcontext(three_bits(kind, 0)) as model:
        yield model


@pytest.fixture(params=[pytest.param(kind, marks=marks) for kind, marks in LOSSLESS])
def twins(request: pytest.FixtureRequest) -> Iterator[tuple[str, Pair]]:
    """A kind of model, its original and its lossless one."""
    with raw_pages(request.param) as model:
        yield request.param, (original(request.param), model)


def prefilled(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None) -> QuantizedCache:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).past_key_values


def logits_after(
    kind: str, model: PreTrainedModel, cache: QuantizedCache, seed: int = 5
) -> torch.Tensor:
    with torch.no_grad():
        return model(prompts(kind, cache.batch, 3, seed=seed), past_key_values=cache).logits


@pytest.mark.parametrize("mode", ORIGINALS)
def test_lossless_equals_the_original(twins: tuple[str, Pair], mode: str) -> None:
    kind, pair = twins
    assert_same_text(pair, prompts(kind, 2, 20), **ORIGINALS[mode])


def test_lossless_prompt_lookup_equals_the_original(twins: tuple[str, Pair]) -> None:
    kind, pair = twins
    prompt = torch.cat([prompts(kind, 1, 12), prompts(kind, 1, 12)], 1)
    assert_same_text(pair, prompt, prompt_lookup_num_tokens=3)


def test_lossless_padded_batch_equals_the_original(twins: tuple[str, Pair]) -> None:
    kind, pair = twins
    ids, mask = left_padded(20, 0, 7, 19, kind=kind)
    assert_same_text(pair, ids, attention_mask=mask)


def test_padded_row_equals_row_alone(kind: str, model: PreTrainedModel) -> None:
    ids, mask = left_padded(70, 0, 33, kind=kind)
    batch = generate(model, ids, attention_mask=mask)
    alone = generate(model, ids[1:, 33:])
    assert torch.equal(batch[1, 70:], alone[0, 37:])


def test_batch_equals_single(kind: str, model: PreTrainedModel) -> None:
    ids = prompts(kind, 3, 66)
    batch = generate(model, ids)
    assert torch.equal(batch, torch.cat([generate(model, row[None]) for row in ids]))


def test_warm_equals_cold(kind: str, paged: PreTrainedModel) -> None:
    with quantised_attention(paged):
        ids = prompts(kind, 2, 80)
        warm = generate(paged, ids, past_key_values=prefilled(paged, ids[:, :50]))
        cold = generate(paged, ids)
    assert torch.equal(warm, cold)


def test_cropped_equals_never_appended(kind: str, paged: PreTrainedModel) -> None:
    cropped = prefilled(paged, prompts(kind, 2, 70))
    prefilled(paged, prompts(kind, 2, 40, seed=9), cropped)
    cropped.crop(-40)
    plain = prefilled(paged, prompts(kind, 2, 70))
    assert torch.equal(logits_after(kind, paged, cropped), logits_after(kind, paged, plain))


def test_one_by_one_equals_at_once(kind: str, paged: PreTrainedModel) -> None:
    """Single tokens at the start of the first page, and over the start of the second."""
    with quantised_attention(paged):
        ids, cache = prompts(kind, 2, 71), None
        for part in ids[:, :70].split([1] * 5 + [50] + [1] * 15, 1):
            cache = prefilled(paged, part, cache)
        got = generate(paged, ids, past_key_values=cache)
        assert torch.equal(got, generate(paged, ids))


def test_chunked_equals_whole(kind: str, paged: PreTrainedModel) -> None:
    with quantised_attention(paged):
        whole = generate(paged, prompts(kind, 2, 90))
        assert torch.equal(generate(paged, prompts(kind, 2, 90), prefill_chunk_size=17), whole)


def test_reordered_equals_recomputed(kind: str, model: PreTrainedModel) -> None:
    order = torch.tensor([2, 0, 0])
    cache = prefilled(model, prompts(kind, 3, 70))
    cache.reorder_cache(order)
    fresh = prefilled(model, prompts(kind, 3, 70)[order])
    torch.testing.assert_close(logits_after(kind, model, cache), logits_after(kind, model, fresh))


def test_beams_equal_their_sequences_scored_alone(kind: str, model: PreTrainedModel) -> None:
    """Scores that beams have gathered through reordered caches are those of each text by itself."""
    out = generate(
        model, prompts(kind, 1, 66), num_beams=3, num_return_sequences=3, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    gathered = model.compute_transition_scores(
        out.sequences, out.scores, out.beam_indices, normalize_logits=False
    ).sum(1)
    for text, expected in zip(out.sequences, gathered, strict=True):
        torch.testing.assert_close(_alone(model, text, 66), expected, rtol=1e-3, atol=1e-3)


def _alone(model: PreTrainedModel, text: torch.Tensor, prompt: int) -> torch.Tensor:
    """Sum of the log-probabilities of the tokens behind the prompt, fed one by one."""
    total, cache, step = torch.zeros(()), None, text[None, :prompt]
    for token in text[prompt:]:
        with torch.no_grad():
            out = model(step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, token.view(1, 1)
        total = total + out.logits[0, -1].float().log_softmax(-1)[token]
    return total


def test_prompt_lookup_equals_greedy(kind: str, paged: PreTrainedModel) -> None:
    prompt = torch.cat([prompts(kind, 1, 40), prompts(kind, 1, 40)], 1)
    with quantised_attention(paged):
        greedy = generate(paged, prompt)
        assert torch.equal(generate(paged, prompt, prompt_lookup_num_tokens=3), greedy)


def test_repeated_rows_equal_rows_of_their_own(kind: str, model: PreTrainedModel) -> None:
    cache = prefilled(model, prompts(kind, 2, 70))
    cache.batch_repeat_interleave(2)
    fresh = prefilled(model, prompts(kind, 2, 70).repeat_interleave(2, 0))
    torch.testing.assert_close(logits_after(kind, model, cache), logits_after(kind, model, fresh))


def test_reset_equals_new(kind: str, model: PreTrainedModel) -> None:
    cache = prefilled(model, prompts(kind, 2, 70))
    cache.reset()
    again = prefilled(model, prompts(kind, 2, 70), cache)
    fresh = prefilled(model, prompts(kind, 2, 70))
    assert torch.equal(logits_after(kind, model, again), logits_after(kind, model, fresh))
