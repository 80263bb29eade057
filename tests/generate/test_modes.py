"""Every mode of ``generate`` that transformers ships: losslessly the original's tokens."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    TextIteratorStreamer,
    WatermarkingConfig,
    pipeline,
)

import kvquant_compile
from tests.generate.models import (
    assert_same_text,
    generate,
    left_padded,
    lossless,
    three_bits,
    tokenizer,
)
from tests.zoo import tiny, tokens

STOP = [7, 9, 11, 13, 40, 50, 60, 70, 97]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "early stop": {"eos_token_id": STOP, "max_new_tokens": 40},
    "beams that stop early": {"num_beams": 3, "eos_token_id": STOP, "early_stopping": True},
    "chunked prefill": {"prefill_chunk_size": 7},
    "chunked prefill with beams": {"prefill_chunk_size": 7, "num_beams": 2},
    "without a cache": {"use_cache": False},
    "dynamic cache by name": {"cache_implementation": "dynamic"},
    "disable_compile": {"disable_compile": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "watermark": {"do_sample": True, "watermarking_config": WatermarkingConfig()},
    "guidance": {"guidance_scale": 1.5, "negative_prompt_ids": tokens(2, 5, seed=3)},
    "from a generation config": {
        "generation_config": GenerationConfig(max_new_tokens=9, num_beams=2, pad_token_id=0)
    },
}
LOOKUP: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup, sampling": {"prompt_lookup_num_tokens": 3, "do_sample": True},
    "prompt lookup, chunked": {"prompt_lookup_num_tokens": 3, "prefill_chunk_size": 7},
    "prompt lookup, early stop": {"prompt_lookup_num_tokens": 3, "eos_token_id": STOP},
}


@pytest.mark.parametrize("mode", MODES)
def test_mode(mode: str) -> None:
    assert_same_text(lossless(), tokens(2, 20), **MODES[mode])


@pytest.mark.parametrize("mode", LOOKUP)
def test_prompt_lookup(mode: str) -> None:
    prompt = torch.cat([tokens(1, 12), tokens(1, 12)], 1)  # something to look up
    assert_same_text(lossless(), prompt, **LOOKUP[mode])


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("optimised", [False, True])
def test_assisted(sampling: bool, optimised: bool) -> None:
    assistant = tiny("llama", seed=1, num_hidden_layers=1)
    if optimised:
        kvquant_compile.optimize(assistant, bits=16, progress=False)
    options = {"assistant_model": assistant, "do_sample": sampling}
    assert_same_text(lossless(), tokens(1, 20), **options)


def test_optimised_model_assists_an_original() -> None:
    original, ours = lossless()
    other = tiny("llama", seed=1)
    texts = [generate(other, tokens(1, 20), assistant_model=m) for m in (original, ours)]
    assert torch.equal(*texts)


def test_custom_loop() -> None:
    def loop(model: PreTrainedModel, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        cache, ids = options["past_key_values"], input_ids
        step = ids
        for _ in range(5):
            with torch.no_grad():
                logits = model(step, past_key_values=cache, logits_to_keep=1).logits
            step = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], 1)
        return ids

    assert_same_text(lossless(), tokens(2, 20), custom_generate=loop)


class _EveryRow(StoppingCriteria):
    """Row i stops after 3 + 4 i new tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = input_ids.shape[1] - 20
        return torch.tensor([done >= 3 + 4 * row for row in range(len(input_ids))])


def test_rows_that_stop_one_after_another() -> None:
    assert_same_text(lossless(), tokens(3, 20), stopping_criteria=[_EveryRow()])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_left_padding(options: dict[str, Any]) -> None:
    ids, mask = left_padded(20, 0, 7, 19)
    assert_same_text(lossless(), ids, attention_mask=mask, **options)


def test_right_padding() -> None:
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 14:] = 0
    assert_same_text(lossless(), tokens(2, 20), attention_mask=mask)


def test_own_positions() -> None:
    positions = torch.arange(5, 25).expand(2, -1)
    assert_same_text(lossless(), tokens(2, 20), position_ids=positions)


@pytest.mark.parametrize("with_ids", [False, True])
def test_inputs_embeds(with_ids: bool) -> None:
    ids, texts = tokens(2, 20), []
    for model in lossless():
        embeds = model.get_input_embeddings()(ids)
        texts.append(generate(model, ids if with_ids else None, inputs_embeds=embeds))
    assert torch.equal(*texts)


@pytest.mark.parametrize("keep", [1, 3, 0])
def test_logits_to_keep(keep: int) -> None:
    with torch.no_grad():
        expected, got = (model(tokens(), logits_to_keep=keep).logits for model in lossless())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
def test_scores_and_logits(beams: int) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, got = (generate(model, tokens(), num_beams=beams, **options) for model in lossless())
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-3)
    assert isinstance(got.past_key_values, kvquant_compile.QuantizedCache)


def test_loss_of_labels() -> None:
    with torch.no_grad():
        expected, got = (model(tokens(), labels=tokens()).loss for model in lossless())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_tuples() -> None:
    with torch.no_grad():
        expected, got = (model(tokens(), return_dict=False) for model in lossless())
    assert type(got) is type(expected)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)


def test_streaming() -> None:
    model, ids = three_bits(), tokens(1, 20)
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=120)
    thread = threading.Thread(target=generate, args=(model, ids), kwargs={"streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.split() == tokenizer().decode(generate(model, ids)[0, 20:]).split()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(batch_size: int) -> None:
    prompts = ["w5 w6 w7 w8 w9", "w10 w11"]
    texts = []
    for model in lossless():
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer())
        config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
        texts.append(pipe(prompts, batch_size=batch_size, generation_config=config))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("turns", [2, 4])
def test_turns_with_the_returned_cache(turns: int) -> None:
    texts = []
    for model in lossless():
        ids, cache = tokens(2, 9), None
        for turn in range(turns):
            out = generate(model, ids, past_key_values=cache, return_dict_in_generate=True)
            cache = out.past_key_values
            ids = torch.cat([out.sequences, tokens(2, 5, seed=turn)], 1)
        texts.append(ids)
    assert torch.equal(*texts)


def test_turns_after_rows_that_stopped() -> None:
    """A finished row's fillers are cached; the next turn's mask leaves them out."""
    texts = []
    for model in lossless():
        options: dict[str, Any] = {"stopping_criteria": [_EveryRow()]}
        first = generate(model, tokens(3, 20), return_dict_in_generate=True, **options)
        mask = (first.sequences != 0).long()
        ids = torch.cat([first.sequences, tokens(3, 5, seed=3)], 1)
        mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.int64)], 1)
        cache = first.past_key_values
        texts.append(generate(model, ids, attention_mask=mask, past_key_values=cache))
    assert torch.equal(*texts)


def test_one_prompt_cache_for_many_continuations() -> None:
    """What transformers' guide does with ``copy.deepcopy`` of a prompt's cache."""
    import copy

    texts = []
    for model in lossless():
        with torch.no_grad():
            prompt = model(tokens(1, 70), use_cache=True).past_key_values
        made = []
        for seed in range(3):
            ids = torch.cat([tokens(1, 70), tokens(1, 4, seed=seed)], 1)
            made.append(generate(model, ids, past_key_values=copy.deepcopy(prompt)))
        texts.append(torch.cat(made))
        assert prompt.get_seq_length() == 70
    assert torch.equal(*texts)
