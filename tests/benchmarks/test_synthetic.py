"""Synthetic caches are caches: what the ops read from them is finite, and slots are in range."""

from __future__ import annotations

import pytest
import torch

import kvquant_compile
from benchmarks.cases import DEFAULT, FORMATS, GROUPS, Format, Size
from benchmarks.contenders import ours
from benchmarks.decoders import CONTENDERS, Job
from benchmarks.model_decode import effective_bits, weight_bytes
from benchmarks.models import random_llama
from benchmarks.synthetic import fill_pages, filled_cache, random_artifact, tables_with_feedback
from kvquant_compile.codec.feedback import STAGE_CHANNELS
from kvquant_compile.codec.layout import PageLayout, padded, unpack_keys, unpack_values
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.recent import ring_span
from kvquant_compile.recipes.choice import choose

CPU = torch.device("cpu")


def test_filled_pages_have_finite_scales_and_distinct_channels() -> None:
    layout = PageLayout(CodecSpec(3, 4, 4, 2, True, 1), 2, 80, 64, 2)
    slab = torch.zeros(3, 2, layout.page_bytes, dtype=torch.uint8)
    fill_pages(slab, layout, torch.Generator().manual_seed(0))
    pages = slab.transpose(0, 1)[None]
    keys, values = unpack_keys(layout, pages), unpack_values(layout, pages)
    for codes, dim in ((keys, 80), (values, 64)):
        assert codes.slot_residual.isfinite().all()
        assert int(codes.slot_index.max()) < dim
        ordered = codes.slot_index.sort(-1).values.int()
        assert (ordered.diff(dim=-1) > 0).all()
    assert keys.token_scale is not None
    assert keys.token_scale.isfinite().all()
    assert len(keys.codes.unique()) == 8
    assert len(values.codes.unique()) == 16


def test_a_filled_cache_decodes_and_has_room() -> None:
    model = random_llama("tiny", CPU)
    spec = CodecSpec(3, 3, 1, 1, True, 1)
    kvquant_compile.optimize(model, calibration=random_artifact(model, spec), progress=False)
    cache = kvquant_compile.new_cache(model)
    filled_cache(cache, 2, 150, 60)
    assert (cache.get_seq_length(), cache.lengths.tolist()) == (150, [150, 150])
    allocated = cache.nbytes()
    ids = torch.ones(2, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(3):
            logits = model(input_ids=ids, past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.get_seq_length() == 153
    assert cache.nbytes() == allocated


def test_a_filled_ring_holds_the_last_tokens() -> None:
    model = random_llama("tiny", CPU)
    spec = CodecSpec(3, 3, 0, 0, True, 1, 16)
    kvquant_compile.optimize(model, calibration=random_artifact(model, spec), progress=False)
    cache = kvquant_compile.new_cache(model)
    filled_cache(cache, 2, 150, 60)
    for layer in cache.pages:
        low, end = ring_span(layer.sinks)
        assert (low.tolist(), end.tolist()) == ([134, 134], [150, 150])
    with torch.no_grad():
        logits = model(input_ids=torch.ones(2, 1).long(), past_key_values=cache).logits
    assert logits.isfinite().all()
    assert ring_span(cache.pages[0].sinks)[1].tolist() == [151, 151]


@pytest.mark.parametrize("contender", ["ours", "dynamic"])
def test_contenders_report_every_setting(contender: str) -> None:
    job = Job(contender, "tiny", ((1, 70), (2, 65)), 2, "cpu", CodecSpec(3, 3, 0, 0, False, 0))
    first, *rows = CONTENDERS[contender](job)
    assert first is None
    assert {(r["batch"], r["tokens"]) for r in rows if r} == {(1, 70), (2, 65)}
    assert all(r["tokens_per_second"] > 0 for r in rows if r)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_estimated_bits_are_the_layout_s(form: Format) -> None:
    spec = form.spec
    job = Job("ours", "llama-3-8b", ((1, 1),), 1, "cpu", spec)
    assert effective_bits(job) == PageLayout(spec, 8, 128, 128, 2).effective_bits


def test_estimated_weights_are_the_model_s() -> None:
    model = random_llama("tiny", CPU)
    actual = sum(p.nbytes for p in model.parameters())
    assert weight_bytes("tiny") == pytest.approx(actual, rel=0.01)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_the_op_runs_on_every_set_of_a_case(form: Format) -> None:
    size = Size(4, 2, 70, dim=32)
    contender = ours(form, size, CPU)
    assert len(contender.calls) >= 3
    outputs = [call()[0] for call in contender.calls[:3]]
    assert all(x.isfinite().all() for x in outputs)
    assert not torch.equal(outputs[0], outputs[1])


def test_default_is_what_optimize_stores() -> None:
    choice = choose(None, None)
    assert DEFAULT.spec == choice.formats([0])[0]
    assert len({form.name for form in FORMATS}) == len(FORMATS)


def test_short_caches_are_rotated_past_the_l2_cache() -> None:
    for size in (s for group in GROUPS.values() for s in group):
        nbytes = size.dense_bytes(2)
        if size.tokens * size.batch <= 131072:
            assert size.sets(nbytes) >= 3
            assert size.sets(nbytes) * nbytes >= 150_000_000
        else:
            assert nbytes >= 3 * 50_000_000


def test_random_feedback_moves_later_stages_only() -> None:
    spec = CodecSpec(3, 3, 0, 0, False, 0)
    tables = tables_with_feedback(spec, 2, 40, torch.Generator().manual_seed(0))
    for matrix, dim in ((tables.key_feedback, padded(40)), (tables.value_feedback, 40)):
        assert matrix.shape == (2, dim, dim)
        stage = torch.arange(dim) // STAGE_CHANNELS
        assert not matrix[:, stage[:, None] >= stage].any()
        assert matrix[:, stage[:, None] < stage].float().std() > 5
