"""The memory model against what torch's allocator says, and what it is used for."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
import sympy
import torch
from torch.autograd.profiler import profile
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile import OptionError, max_context, memory_report
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.memory import BATCH, CONTEXT, parse_bytes
from kvquant_compile.memory.allocated import weight_bytes
from kvquant_compile.memory.report import largest
from kvquant_compile.runtime.installed import ATTRIBUTE
from tests.zoo import decoder, tiny, tokens

TEXT = tokens(8, 64, seed=7)


def optimised(kind: str = "llama", **options: Any) -> PreTrainedModel:
    network = tiny(kind, **{"max_position_embeddings": 12_288, **options.pop("sizes", {})})
    return kvquant_compile.optimize(network, **{"bits": 3, "calibration": TEXT, **options})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return optimised(prefill_chunk=1500)


def measured_peak(run: Any) -> int:
    """Bytes that torch allocates at the worst moment of a run, by its documented profiler."""
    gc.collect()  # what earlier tests have left would be freed, and subtracted, in between
    with profile(profile_memory=True, use_kineto=True) as record:
        run()
    now = peak = 0
    changes = [x for x in record.kineto_results.events() if x.name() == "[memory]"]
    for event in sorted(changes, key=lambda x: x.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("context", "batch", "answer"),
    [(300, 3, 5), (1400, 1, 10), (2500, 2, 5), (3500, 1, 5), (11_000, 1, 5)],
    ids=["short", "long answer", "a chunk and the rest", "chunks", "several blocks of a history"],
)
def test_generation_takes_what_the_model_says(
    model: PreTrainedModel, context: int, batch: int, answer: int
) -> None:
    prompt = context - answer
    report = memory_report(model, context, batch, prompt=prompt)
    ids = tokens(batch, prompt)
    mask, kept = torch.ones_like(ids), {}

    def run() -> None:
        kept["out"] = model.generate(
            ids, attention_mask=mask, max_new_tokens=answer, do_sample=False, eos_token_id=None,
            pad_token_id=0, return_dict_in_generate=True,
        )  # fmt: skip

    peak = measured_peak(run) + ids.nbytes + mask.nbytes
    assert kept["out"].past_key_values.nbytes() == report.bytes("cache")
    beside = report.bytes("weights") + report.bytes("tables")
    assert report.bytes() - beside == pytest.approx(peak, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"kind": "gemma2"}, {"kind": "gpt2", "sizes": {"n_positions": 8192}},
     {"recipe": "kivi", "bits": 4}, {"kind": "gpt_neox"}],
    ids=["gemma2", "gpt2", "kivi", "gpt_neox"],
)  # fmt: skip
@pytest.mark.parametrize(("context", "chunk"), [(5000, 1500), (6000, 4096), (7000, None)])
def test_other_architectures_and_extrapolated_steps(
    options: dict[str, Any], context: int, chunk: int | None
) -> None:
    model = optimised(**options, prefill_chunk=chunk)
    test_generation_takes_what_the_model_says(model, context, 1, 5)


def test_numbers_are_what_is_allocated(model: PreTrainedModel) -> None:
    report = memory_report(model, 200, 2, workspace=False)
    with torch.no_grad():
        cache = model(tokens(2, 200), use_cache=True).past_key_values
    assert cache.nbytes() == report.bytes("cache")
    pages = sum(layer.nbytes() for layer in cache.layers)
    values = {CONTEXT: 200, BATCH: 2}
    assert pages == sum(layer.cache.subs(values) for layer in report.layers)
    state = model.__dict__[ATTRIBUTE]
    names = dict(state.program.graph_module.named_buffers())
    ours = sum(t.nbytes for name, t in names.items() if name.startswith("kvquant_"))
    assert report.bytes("tables") == ours > 0
    assert report.bytes("weights") == weight_bytes(model)
    assert report.bytes("workspace") == 0
    assert "not measured" in str(report)


def test_tied_weights_are_counted_once() -> None:
    network = tiny("llama", tie_word_embeddings=True)
    embedding = network.get_input_embeddings().weight
    alone = sum(p.nbytes for p in network.parameters())
    assert network.lm_head.weight is embedding
    assert weight_bytes(network) == alone + sum(b.nbytes for b in network.buffers())


def test_recurrent_states_are_part_of_the_cache() -> None:
    sizes = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    model = optimised("lfm2", sizes={"num_key_value_heads": 2, **sizes})
    report = memory_report(model, 100, 3)
    with torch.no_grad():
        cache = model(tokens(3, 100), use_cache=True).past_key_values
    assert report.states > 0
    assert cache.nbytes() == report.bytes("cache")


def test_hand_written_decoders_have_a_report() -> None:
    network = kvquant_compile.optimize(
        decoder("SdpaDecoder").eval(), bits=3, calibration=TEXT, example_inputs=(tokens(), None)
    )
    report = memory_report(network, 100)
    with torch.no_grad():
        _, cache = network(tokens(1, 100), None)
    assert cache.nbytes() == report.bytes("cache")
    assert report.bytes("workspace") > 0


def test_formulas_are_sympy_and_json(model: PreTrainedModel) -> None:
    report = memory_report(model, 1000, workspace=False)
    pages = sympy.ceiling(CONTEXT / PAGE_TOKENS)
    per_page = sum(layer.page_bytes for layer in report.layers) + 4 * (PAGE_TOKENS + 1)
    derivative = sympy.expand(report.formulas["cache"]).coeff(pages)
    assert sympy.simplify(derivative - BATCH * per_page) == 0
    record = json.loads(json.dumps(report.to_dict()))
    assert sympy.sympify(record["parts"]["cache"]["formula"]).free_symbols
    assert record["parts"]["total"]["bytes"] == report.bytes()
    assert sum(part["bytes"] for name, part in record["parts"].items() if name != "total") == (
        report.bytes()
    )
    assert report.bytes("cache", context=2000) > report.bytes("cache")


@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_longest_context_fits_and_no_longer_one(batch: int) -> None:
    model = optimised(prefill_chunk=1024)
    fixed = weight_bytes(model)
    for memory in (fixed + 3_000_000, fixed + 30_000_000, fixed + 100_000_000):
        context = max_context(model, memory, batch)
        assert context > 100
        assert memory_report(model, context, batch).bytes() <= memory
        exact = context >= 2048  # two chunks
        longer = context + 1 if exact else context + context // 32 + 2
        assert memory_report(model, longer, batch).bytes() > memory
    assert max_context(model, fixed, batch) == 0


def test_tables_of_positions_end_a_context() -> None:
    network = decoder("CappedDecoder").eval()
    kvquant_compile.optimize(network, bits=16, example_inputs=(tokens(), None))
    assert max_context(network, "1 GB") == network.table.shape[0]


def test_largest() -> None:
    assert [largest(lambda n, m=m: n <= m) for m in (0, 1, 2, 3, 1000)] == [0, 1, 2, 3, 1000]


@pytest.mark.parametrize(
    ("text", "count"),
    [("24 GB", 24 * 10**9), ("1.5GiB", 3 * 2**29), ("512 MiB", 2**29), (1e6, 10**6), ("7B", 7)],
)
def test_bytes_as_people_write_them(text: Any, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["24", "GB", "24 gb", "1 kiB", -1, 0, True, None, float("nan")])
def test_other_memories_are_refused(text: Any) -> None:
    with pytest.raises(OptionError, match="memory="):
        parse_bytes(text)


@pytest.mark.parametrize("numbers", [{"context": 0}, {"context": 5, "batch": 0}, {"context": 1.5}])
def test_numbers_that_mean_nothing_are_refused(
    model: PreTrainedModel, numbers: dict[str, Any]
) -> None:
    with pytest.raises(OptionError):
        memory_report(model, **numbers)
