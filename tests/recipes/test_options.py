"""What may be asked of a recipe, what is refused, and what is reported of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvquant_compile
from kvquant_compile.codec.algebra import RecipeTables
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.errors import OptionError
from kvquant_compile.lowering.triton import dispatch
from kvquant_compile.recipes import kivi
from kvquant_compile.runtime.installed import installed
from tests.recipes.models import TEXT, difference, optimised, original, quantised
from tests.zoo import tiny, unproved


def test_an_artifact_has_its_recipe() -> None:
    given = kvquant_compile.artifact(optimised("int"))
    with pytest.raises(OptionError, match="another format"):
        kvquant_compile.optimize(tiny("llama"), calibration=given, recipe="qserve")
    with pytest.raises(OptionError, match="another format"):
        kvquant_compile.optimize(tiny("llama"), calibration=given, bits=3)
    kvquant_compile.optimize(tiny("llama"), 3, calibration=given, recipe="int")


def test_widths_by_layer_and_lossless_layers() -> None:
    model = kvquant_compile.optimize(tiny("llama"), {0: (4, 2), 1: 16}, recipe="int")
    layers = kvquant_compile.explain(model).layers
    assert [x.recipe for x in layers] == ["int k4v2", "lossless"]
    assert [x.rope for x in layers] == ["kept", "half 16"]


def test_keys_before_or_after_rope_as_the_recipe_says() -> None:
    for name, rope in (("kivi", "kept"), ("rotatekv", "half 16"), ("kvquant", "half 16")):
        assert {x.rope for x in kvquant_compile.explain(optimised(name)).layers} == {rope}


def test_calibration_happens_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("calibrated")

    assert kvquant_compile.artifact(optimised("kivi")).details["source"] == "none needed"
    monkeypatch.setattr("kvquant_compile.calib.calibrate.observe_windows", refuse)
    with pytest.raises(AssertionError, match="calibrated"):
        kvquant_compile.optimize(tiny("llama"), recipe="fp8")


def test_kvquant_as_published_differs_from_ours_in_tables_only() -> None:
    model = optimised("kvquant")
    tables = kvquant_compile.artifact(model).tables[0]
    spec = kvquant_compile.artifact(model).specs[0]
    assert spec == CodecSpec(2, 2, 2, 2, False, 1)
    assert not isinstance(tables, RecipeTables)
    assert torch.equal(tables.key_table[0], tables.key_table[1])  # one table a layer
    assert tables.key_feedback.numel() == tables.value_feedback.numel() == 0
    alike = kvquant_compile.optimize(
        tiny("llama"), 2, recipe="kvquant", slots=1, calibration=TEXT, own_text=0
    )
    ours, published, fewer = (
        difference(quantised(m)[0], original()) for m in (optimised("kvquant+"), model, alike)
    )
    assert ours < fewer
    assert published < fewer


@pytest.mark.parametrize("name", ["kvquant", "rotatekv", "rvq"])
def test_an_artifact_brings_the_recipe_back(name: str, tmp_path: Path) -> None:
    model = optimised(name)
    path = tmp_path / "tables.safetensors"
    kvquant_compile.artifact(model).save(path)
    again = kvquant_compile.optimize(tiny("llama"), calibration=str(path))
    assert torch.equal(quantised(again)[0], quantised(model)[0])
    assert kvquant_compile.explain(again).layers == kvquant_compile.explain(model).layers


def test_sinks_can_be_asked_for() -> None:
    model = kvquant_compile.optimize(tiny("llama"), 1, recipe="int", sinks=5)
    assert kvquant_compile.explain(model).sinks == 5
    error = difference(quantised(model)[0][:, :5], original()[:, :5])
    assert error < 1e-5


def test_kernels_leave_recipes_to_the_reference_op() -> None:
    layout = installed(optimised("kivi")).program.layouts[0]
    reason = dispatch.unsupported(layout)
    assert "kivi" in reason
    assert not dispatch.use_kernels(torch.zeros(1), str(layout))
    with pytest.raises(ValueError, match="not a page format"):
        dispatch.use_kernels(torch.zeros(1), "recipe Recipe(")


def test_keys_that_cannot_be_taken_before_rope_are_no_matter_behind_it() -> None:
    model = unproved()
    with pytest.raises(kvquant_compile.UnsupportedLayerError):
        kvquant_compile.optimize(model, recipe="rotatekv", calibration=TEXT)
    kvquant_compile.optimize(model, 4, recipe="kivi")
    assert {x.refusal for x in kvquant_compile.explain(model).layers} == {""}


def test_exact_tokens_are_reported_and_allocated() -> None:
    model = optimised("kivi")
    cache = quantised(model)[1]
    rows = 32 + 1  # the ring, and a row for what it holds
    assert [x.exact_bytes for x in kvquant_compile.explain(model).layers] == [rows * 2 * 32 * 4] * 2
    assert [x.sinks.nbytes for x in cache.pages] == [2 * rows * 2 * 32 * 4] * 2
    assert "16,896 bytes of exact tokens" in str(kvquant_compile.explain(model))


def test_a_function_must_make_recipes() -> None:
    for make in (lambda: None, lambda bits, values: None, lambda *widths: kivi):
        with pytest.raises(OptionError, match="cannot be made"):
            kvquant_compile.optimize(tiny("llama"), 3, recipe=make)
