"""Decode steps as graphs, on a CPU: the same text as without."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.runtime import paged
from kvquant_compile.runtime.installed import installed
from tests.runtime.decode_graph.helpers import GREEDY, both, graphs
from tests.runtime.recording import Recording
from tests.zoo import decoder, tiny, tokens


def test_greedy_text_is_the_same(each: PreTrainedModel) -> None:
    _, backend = both(each, tokens(2, 9), eos_token_id=None)
    # 20 tokens: a prompt, one eager step, one capture, 18 replays.
    assert (backend.captures, backend.replays) == (1, 18)


def test_left_padded_batch(llama: PreTrainedModel) -> None:
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :11] = 0, 0
    _, backend = both(llama, ids, attention_mask=mask, eos_token_id=None)
    assert (backend.captures, backend.replays) == (1, 18)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2,
     "num_beams": 2}, {"use_cache": False}],
    ids=lambda o: "+".join(o),
)  # fmt: skip
def test_generation_modes(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    _, backend = both(llama, tokens(1, 9), eos_token_id=None, **options)
    if "num_beams" in options:  # rows are reordered in place, so one capture serves
        assert backend.captures == 1


def test_growth_is_reserved_by_generate(llama: PreTrainedModel) -> None:
    _, backend = both(llama, tokens(1, 60), eos_token_id=None)
    assert backend.captures == 1
    out = llama.generate(tokens(1, 60), return_dict_in_generate=True, **GREEDY)
    assert out.past_key_values.table.shape == (1, 2)
    assert len(out.past_key_values.layers[0].slabs) == 1


def test_growth_in_the_middle(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "AHEAD", 0)
    _, backend = both(llama, tokens(2, 60), eos_token_id=None)
    assert (backend.captures, backend.replays) == (2, 17)


def test_two_threads(llama: PreTrainedModel, backend: Recording) -> None:
    texts: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        texts[seed] = llama.generate(tokens(1, 9, seed=seed), eos_token_id=None, **GREEDY)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.captures == 2
    kvquant_compile.use_cuda_graphs(llama, False)
    for seed, text in texts.items():
        assert torch.equal(
            text, llama.generate(tokens(1, 9, seed=seed), eos_token_id=None, **GREEDY)
        )


def test_the_switch(llama: PreTrainedModel, backend: Recording) -> None:
    kvquant_compile.use_cuda_graphs(llama, False)
    llama.generate(tokens(1, 9), **GREEDY)
    assert backend.captures == 0
    assert "switched off" in str(kvquant_compile.explain(llama))
    kvquant_compile.use_cuda_graphs(llama)
    assert kvquant_compile.explain(llama).decode_step == "CUDA graph"
    model = kvquant_compile.optimize(tiny("llama"), bits=16, cuda_graphs=False)
    assert not installed(model).cuda_graphs


def test_a_cpu_has_no_graphs(llama: PreTrainedModel) -> None:
    assert "cpu has none" in str(kvquant_compile.explain(llama))


def test_a_failing_capture_falls_back_with_one_warning(llama: PreTrainedModel) -> None:
    expected, backend = llama.generate(tokens(1, 9), eos_token_id=None, **GREEDY), Recording()
    backend.fail = RuntimeError("operation not permitted when stream is capturing\nmore")
    installed(llama).warned.clear()
    with graphs(llama, backend), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(llama.generate(tokens(1, 9), eos_token_id=None, **GREEDY), expected)
        assert "not permitted" in kvquant_compile.explain(llama).decode_step
        assert torch.equal(llama.generate(tokens(1, 9), eos_token_id=None, **GREEDY), expected)
        kvquant_compile.use_cuda_graphs(llama)
        backend.fail = None
        assert torch.equal(llama.generate(tokens(1, 9), eos_token_id=None, **GREEDY), expected)
    assert len([w for w in caught if "without a CUDA graph" in str(w.message)]) == 1
    assert (backend.captures, backend.replays) == (2, 18)


def loop(name: str, backend: Recording) -> tuple[str, torch.Tensor]:
    """Why a hand-written decoder has no graph, and its logits in its own loop."""
    model = decoder(name).eval()
    kvquant_compile.optimize(model, bits=16, example_inputs=(tokens(), None))
    with graphs(model, backend), torch.no_grad():
        past = model(tokens(2, 5), None)[1]
        for i in range(5):
            logits, past = model(tokens(2, 1, seed=i), past)
        return installed(model).decode.refusal, logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["SdpaDecoder", "CappedDecoder"])  # an arange, a sliced table
def test_a_hand_written_decoder_that_counts_positions(name: str) -> None:
    backend, original = Recording(), decoder(name).eval()
    refusal, logits = loop(name, backend)
    ids = torch.cat([tokens(2, 5), *(tokens(2, 1, seed=i) for i in range(5))], 1)
    assert refusal == ""
    assert (backend.captures, backend.replays) == (1, 4)
    torch.testing.assert_close(logits, original(ids, None)[0][:, -1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_table_of_positions_ends() -> None:
    model = decoder("CappedDecoder").eval()
    kvquant_compile.optimize(model, bits=16, example_inputs=(tokens(), None))
    most = model.table.shape[0]
    _, past = model(tokens(1, most), None)
    with pytest.raises(kvquant_compile.CacheError, match="end after"):
        model(tokens(1, 1), past)
    assert past.get_seq_length() == most
