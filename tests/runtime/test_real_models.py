"""Trained models: lossless mode equals the original, and measured bytes equal reported ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kvquant_compile

pytestmark = pytest.mark.shared
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LENGTHS = (1, 7, 130, 1500)


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def big(shared: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(original, lossless) of 63 M parameters."""
    path = shared / "models" / "llama-63m"
    return load(path), kvquant_compile.optimize(load(path), bits=16)


@pytest.fixture(scope="module")
def text(shared: Path) -> torch.Tensor:
    """Token ids [N] of real text."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "llama-63m")
    words = (shared / "data" / "wikitext2_test.txt").read_text(encoding="utf-8")[:40000]
    return torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def small(shared: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(original, lossless) with 8 channels per head, which pages pad to 16."""
    path = shared / "models" / "stories260k"
    original = load(path)
    assert original.config.hidden_size // original.config.num_attention_heads == 8
    return original, kvquant_compile.optimize(load(path), bits=16)


def relative_error(pair: tuple, ids: torch.Tensor, **options: Any) -> float:
    with torch.no_grad():
        expected, got = (model(ids, **options).logits for model in pair)
    return float((got - expected).norm() / expected.norm())


def generate(model: PreTrainedModel, ids: torch.Tensor, count: int, **options: Any) -> Any:
    return model.generate(ids, max_new_tokens=count, **GREEDY, **options)


def left_padded(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the four prompts and its mask."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:], mask[row, -length:] = text[:length], 1
    return ids, mask


@pytest.mark.parametrize("length", LENGTHS)
def test_lossless_logits_equal_the_originals(big: tuple, text: torch.Tensor, length: int) -> None:
    assert relative_error(big, text[None, :length]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_lossless_greedy_text_is_identical(big: tuple, text: torch.Tensor, length: int) -> None:
    outputs = [generate(model, text[None, :length], 200) for model in big]
    assert torch.equal(*outputs)


@pytest.mark.slow
def test_lossless_left_padded_batch_is_identical(big: tuple, text: torch.Tensor) -> None:
    ids, mask = left_padded(text)
    outputs = [generate(model, ids, 200, attention_mask=mask) for model in big]
    assert torch.equal(*outputs)


@pytest.mark.slow
def test_three_bits_generate_on_pages_of_the_reported_size(
    shared: Path, text: torch.Tensor
) -> None:
    model = load(shared / "models" / "llama-63m")
    kvquant_compile.optimize(model, bits=3, calibration=text[4000:], windows=2)
    assert_reported_bytes(model, text[None, :300])


def assert_reported_bytes(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Allocated pages are what the report says; nothing else but exact tokens and indices."""
    output = generate(model, ids, 40, return_dict_in_generate=True)
    cache, report = output.past_key_values, kvquant_compile.explain(model)
    pages = cache.table.numel()
    packed = sum(slab.nbytes for layer in cache.pages for slab in layer.slabs)
    assert packed == pages * 64 * report.bytes_per_token
    sinks = sum(layer.sinks.nbytes for layer in cache.pages)
    assert cache.nbytes() == packed + sinks + (
        cache.table.nbytes + cache.positions.nbytes + cache.lengths.nbytes
    )
    elements = sum(x.kv_heads * (x.key_dim + x.value_dim) for x in report.layers)
    tokens = int(cache.lengths.sum())
    assert cache.effective_bits() == pytest.approx(8 * cache.nbytes() / (tokens * elements))


def test_padded_heads_are_lossless(small: tuple) -> None:
    ids = torch.randint(3, 500, (2, 100), generator=torch.Generator().manual_seed(0))
    assert relative_error(small, ids) <= 1e-5
    outputs = [generate(model, ids, 100) for model in small]
    assert torch.equal(*outputs)


def test_padded_heads_at_four_bits(shared: Path, small: tuple) -> None:
    path = shared / "models" / "stories260k"
    model = kvquant_compile.optimize(load(path), bits=4, windows=4)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    expected, got = (generate(m, ids, 60) for m in (small[0], model))
    assert got.shape == expected.shape
    with kvquant_compile.quantised_attention(model):
        error = relative_error((small[0], model), expected)
    assert 1e-4 < error < 0.2
    assert_reported_bytes(model, ids)
