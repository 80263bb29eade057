"""What a graph was captured under: where it is captured anew, and where steps stay eager."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.runtime.installed import installed
from tests.runtime.decode_graph.helpers import run, started
from tests.runtime.recording import Recording
from tests.zoo import tokens


def test_inference_mode_and_none_alternate(llama: PreTrainedModel, backend: Recording) -> None:
    cache = started(llama)
    expected = run(llama, tokens(1, 1), copy.deepcopy(cache))[0]
    with torch.inference_mode():
        got = llama(tokens(1, 1), past_key_values=cache).logits[:, -1]
    assert torch.equal(got, expected)
    run(llama, tokens(1, 1), cache)
    assert backend.captures == 1


def test_gradients_autocast_and_foreign_captures_stay_eager(
    llama: PreTrainedModel, backend: Recording
) -> None:
    installed(llama).warned.clear()
    cache = started(llama)
    replays = backend.replays
    with pytest.warns(UserWarning, match="no_grad"):
        llama(tokens(1, 1), past_key_values=cache)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        llama(tokens(1, 1), past_key_values=cache)
    backend.place = None
    run(llama, tokens(1, 1), cache)
    assert backend.replays == replays


@pytest.mark.filterwarnings("ignore")
def test_inside_torch_compile(llama: PreTrainedModel, backend: Recording) -> None:
    cache = started(llama)
    expected = run(llama, tokens(1, 1), copy.deepcopy(cache))[0]
    compiled = torch.compile(llama.forward, backend="eager")
    assert torch.allclose(run(compiled, tokens(1, 1), cache)[0], expected)


def test_moved_weights_are_captured_anew(llama: PreTrainedModel, backend: Recording) -> None:
    cache = started(llama)
    weight = llama.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone()
    run(llama, tokens(1, 1), cache)
    run(llama, tokens(1, 1), cache)
    assert backend.captures == 2


def test_other_circumstances_are_captured_anew(llama: PreTrainedModel, backend: Recording) -> None:
    cache = started(llama)
    with kvquant_compile.quantised_attention(llama):
        got = [run(llama, tokens(1, 1), cache)[0] for _ in range(2)]
    assert backend.captures == 2
    kvquant_compile.use_cuda_graphs(llama, False)
    cache.crop(-2)
    with kvquant_compile.quantised_attention(llama):
        expected = [run(llama, tokens(1, 1), cache)[0] for _ in range(2)]
    assert all(map(torch.equal, got, expected))
