"""Hand-written decoders, optimised: their own loop, losslessly and in three bits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import kvquant_compile
from tests.zoo import VOCAB, decoder, tokens

NAMES = ("SdpaDecoder", "WindowDecoder", "MatmulDecoder", "CappedDecoder", "IsCausalDecoder")
EXAMPLE = (tokens(), None)
TEXT = tokens(4, 64, seed=7)
LENGTH = 80


def greedy(model: nn.Module, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, Any]:
    """Continue ids [B, S] by ``count`` tokens; also the last cache."""
    past, step = None, ids
    with torch.no_grad():
        for _ in range(count):
            logits, past = model(step, past)
            step = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], 1)
    return ids, past


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """(original, lossless), same weights."""
    lossless = kvquant_compile.optimize(
        decoder(request.param).eval(), bits=16, example_inputs=EXAMPLE
    )
    return decoder(request.param).eval(), lossless


@pytest.fixture(scope="module", params=NAMES)
def three(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """(original, three bits), same weights. A short window
    would hold exact last tokens only."""
    model = kvquant_compile.optimize(
        decoder(request.param).eval(), bits=3, calibration=TEXT, example_inputs=EXAMPLE,
        recent_window=0 if request.param == "WindowDecoder" else None,
    )  # fmt: skip
    return decoder(request.param).eval(), model


@pytest.mark.parametrize("prompt", [1, 12])
def test_lossless_greedy_loop_equals_the_original(pair: tuple, prompt: int) -> None:
    ids = tokens(2, prompt, seed=5)
    expected, _ = greedy(pair[0], ids, LENGTH)
    got, cache = greedy(pair[1], ids, LENGTH)
    assert torch.equal(got, expected)
    assert isinstance(cache, kvquant_compile.QuantizedCache)
    assert cache.get_seq_length() == prompt + LENGTH - 1


def test_prefill_then_decode_equals_all_at_once(pair: tuple) -> None:
    ids, model = tokens(2, 90, seed=6), pair[1]
    with torch.no_grad():
        whole, _ = model(ids, None)
        first, past = model(ids[:, :70], None)
        rest = []
        for i in range(70, 90):
            logits, past = model(ids[:, i : i + 1], past)
            rest.append(logits)
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=1e-4, atol=1e-4)


def test_three_bit_loop_runs_on_a_packed_cache(three: tuple) -> None:
    ids = tokens(2, 12, seed=5)
    original, model = three
    reference, raw = greedy(original, ids, LENGTH)
    text, cache = greedy(model, ids, LENGTH)
    assert text.shape == reference.shape
    assert torch.equal(text, greedy(model, ids, LENGTH)[0])
    report = kvquant_compile.explain(model)
    pages = 2 * -(-cache.get_seq_length() // 64) * 64
    packed = sum(slab.nbytes for layer in cache.pages for slab in layer.slabs)
    assert packed == pages * report.bytes_per_token
    full = sum(t.nbytes for layer in raw for t in layer) / (2 * raw[0][0].shape[1:3].numel())
    assert packed / pages < 0.2 * report.compression * full


def test_three_bits_are_close_and_not_equal(three: tuple) -> None:
    ids = tokens(2, 60, seed=8)
    with torch.no_grad():
        expected = three[0](ids, None)[0]
        with kvquant_compile.quantised_attention(three[1]):
            got = three[1](ids, None)[0]
    error = float((got - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.3


def test_every_key_was_seen_by_calibration(three: tuple) -> None:
    """Keys that no gradient or value reached would leave scales of zero or one behind."""
    for layer in kvquant_compile.artifact(three[1]).tables.values():
        assert layer.key_scale.unique().numel() > 4
        assert layer.key_weight.unique().numel() > 4


def test_a_foreign_cache_runs_the_original_with_one_warning(pair: tuple) -> None:
    original, model = pair
    ids, step = tokens(2, 9), tokens(2, 1, seed=3)
    with torch.no_grad():
        past = original(ids, None)[1]
        expected, grown = original(step, past)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                got, cache = model(step, past)
                assert torch.equal(got, expected)
                assert type(cache) is type(grown)
    assert len([w for w in caught if "original model" in str(w.message)]) == 1


def test_restore_brings_the_original_back(pair: tuple) -> None:
    original, _ = pair
    name = type(original).__name__
    model = kvquant_compile.optimize(decoder(name).eval(), bits=16, example_inputs=EXAMPLE)
    kvquant_compile.restore(model)
    ids = tokens(2, 9)
    with torch.no_grad():
        logits, past = model(ids, None)
        assert torch.equal(logits, original(ids, None)[0])
    assert isinstance(past, list)
    assert "forward" not in vars(model)


def test_training_mode_is_loud_and_exact() -> None:
    model = kvquant_compile.optimize(decoder("SdpaDecoder").eval(), bits=16, example_inputs=EXAMPLE)
    model.train()
    with pytest.warns(UserWarning, match="training mode"):
        _, past = model(tokens(), None)
    assert isinstance(past, list)


def test_it_samples_its_own_calibration_text() -> None:
    model = kvquant_compile.optimize(
        decoder("SdpaDecoder").eval(), bits=4, windows=1, example_inputs=EXAMPLE
    )
    assert kvquant_compile.explain(model).calibration["source"] == "sampled by the model"
    text, _ = greedy(model, tokens(1, 4), 8)
    assert int(text.max()) < VOCAB


def test_explain_names_the_proof_and_the_line() -> None:
    model = kvquant_compile.optimize(decoder("MatmulDecoder"), bits=16, example_inputs=EXAMPLE)
    report = kvquant_compile.explain(model)
    assert report.convention == "functional"
    assert {layer.rope for layer in report.layers} == {"interleaved 16"}
    assert {layer.proof for layer in report.layers} == {"symbolic"}
    assert all("decoders.py" in layer.source for layer in report.layers)
