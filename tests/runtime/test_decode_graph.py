"""Decode steps as graphs, on a CPU: the same text as without, and nothing that a graph forbids."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.lowering.triton.compat import unavailable
from kvquant_compile.runtime import decode_graph, paged
from kvquant_compile.runtime.decode_graph import DecodeGraphs, _waits
from kvquant_compile.runtime.installed import installed
from tests.runtime.recording import HostSyncError, Recording, no_host_sync
from tests.zoo import decoder, tiny, tokens

GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
TEXT = tokens(8, 64, seed=7)


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_neox", "gpt2"])
def each(request: pytest.FixtureRequest) -> PreTrainedModel:
    return kvquant_compile.optimize(tiny(request.param), bits=3, calibration=TEXT)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return kvquant_compile.optimize(tiny("llama"), bits=3, calibration=TEXT)


@pytest.fixture
def backend(llama: PreTrainedModel) -> Iterator[Recording]:
    """The model's decode steps recorded and replayed."""
    backend = Recording()
    with graphs(llama, backend):
        yield backend


class graphs:
    """A model's decode steps through a backend, in a ``with`` block."""

    def __init__(self, model: Any, backend: Recording) -> None:
        self.model, self.backend = model, backend

    def __enter__(self) -> None:
        state = installed(self.model)
        self.before = state.decode
        state.decode = type(state.decode)(state.program, state.warn_once, self.backend)

    def __exit__(self, *error: object) -> None:
        installed(self.model).decode = self.before


@torch.no_grad()
def run(model: Any, ids: torch.Tensor, cache: Any = None, **given: Any) -> tuple[Any, Any]:
    """Logits of the last token, and the cache."""
    out = model(ids, past_key_values=cache, use_cache=True, **given)
    return out.logits[:, -1], out.past_key_values


def started(model: Any, seed: int = 0, batch: int = 1, length: int = 9) -> Any:
    """A cache that holds a prompt and has a captured decode step, if there is a backend."""
    cache = run(model, tokens(batch, length, seed=seed))[1]
    for step in range(3):
        run(model, tokens(batch, 1, seed=step), cache)
    return cache


class Forgetful(Recording):
    """Keeps nothing of the body, as a real capture; its steps are wrong."""

    def capture(self, body: Any, device: torch.device) -> Any:
        self.captures += 1
        output = body()
        return lambda: output


def both(model: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Recording]:
    """Greedy text, equal with and without graphs; and the backend used."""
    expected = model.generate(ids, **{**GREEDY, **options})
    backend = Recording()
    with graphs(model, backend):
        assert torch.equal(model.generate(ids, **{**GREEDY, **options}), expected)
    return expected, backend


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


def test_inference_mode_and_none_alternate(llama: PreTrainedModel, backend: Recording) -> None:
    cache = started(llama)
    expected = run(llama, tokens(1, 1), copy.deepcopy(cache))[0]
    with torch.inference_mode():
        got = llama(tokens(1, 1), past_key_values=cache).logits[:, -1]
    assert torch.equal(got, expected)
    run(llama, tokens(1, 1), cache)
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


def test_a_past_on_the_host_is_refused(llama: PreTrainedModel) -> None:
    program = installed(llama).program
    inputs = ("hidden", "past", *program.inputs)
    other = dataclasses.replace(program)
    other.__dict__["inputs"] = inputs  # a graph that computes with the number
    backend = Recording()
    assert "past on the host" in DecodeGraphs(other, print, backend).refusal


def symbolic(function: Any) -> list[fx.Node]:
    return list(make_fx(function, tracing_mode="symbolic")(torch.randn(4, 4)).graph.nodes)


@pytest.mark.parametrize(
    "function", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x * x.sum().item()]
)
def test_models_that_wait_are_known(function: Any) -> None:
    assert any(map(_waits, symbolic(function)))


def test_models_that_gather_do_not_wait() -> None:
    assert not any(map(_waits, symbolic(lambda x: x[x[0].argsort()].softmax(-1).topk(2)[1])))


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


def test_a_step_waits_for_nothing_but_its_mask(llama: PreTrainedModel) -> None:
    cache = run(llama, tokens(2, 9))[1]
    with no_host_sync():
        cache.commit(cache.begin(torch.full((2, 1), 9), None))
        cache.commit(cache.begin(torch.arange(10, 14).expand(2, 4), None))
    with pytest.raises(HostSyncError, match="_local_scalar_dense"), no_host_sync():
        cache.begin(torch.full((2, 1), 14), torch.ones(2, 15))


def test_the_torch_path_does_wait(llama: PreTrainedModel) -> None:
    with graphs(llama, Recording(inside_ops=True)), pytest.raises(HostSyncError):
        started(llama)


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")
def test_kernels_do_not_wait() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.runtime.run_kernel_graph"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
