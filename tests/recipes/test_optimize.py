"""Recipes through an optimised model: packed pages, honest bytes, sabotage, options, artifacts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kvquant_compile
from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.calib.observe import behind_rope, observe
from kvquant_compile.capture import capture
from kvquant_compile.codec.algebra import BlockLayout
from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate.baselines import RoundTrip
from kvquant_compile.evaluate.fake import fake_logits
from kvquant_compile.evaluate.run import Prepared, build
from kvquant_compile.evaluate.table import program_logits
from kvquant_compile.lowering.blocks import ring_span
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.recipes import Recipe, int_per_token, kivi
from kvquant_compile.recipes.choice import choose, stored_layers
from tests.recipes.models import IDS, RECIPES, TEXT, difference, optimised, original, quantised
from tests.zoo import decoder, tiny

EVERY = pytest.mark.parametrize("name", RECIPES)


@EVERY
def test_the_model_runs_on_packed_bytes(name: str) -> None:
    model = optimised(name)
    logits, cache = quantised(model)
    assert 1e-3 < difference(logits, original()) < 0.8
    report = kvquant_compile.explain(model)
    (runs,) = {x.implementation for x in report.layers}
    assert runs in str(report)
    layout = cache.pages[0].layout
    assert isinstance(layout, BlockLayout) == (name not in ("kvquant", "kvquant+"))
    if isinstance(layout, BlockLayout):
        assert runs == "reference op"
    assert report.layers[0].recipe in str(report)
    assert all(slab.dtype == torch.uint8 for layer in cache.pages for slab in layer.slabs)
    pages = sum(slab.nbytes for layer in cache.pages for slab in layer.slabs)
    assert pages == 2 * 2 * 3 * 2 * layout.page_bytes  # layers, rows, pages, heads
    elements = 2 * 150 * 2 * 2 * 2 * 16
    assert cache.effective_bits() == pytest.approx(8 * cache.nbytes() / elements)


@EVERY
def test_scrambled_bytes_change_the_logits(name: str) -> None:
    """Nothing but the packed bytes is read for tokens that are packed."""
    model = optimised(name)
    honest, _ = quantised(model)
    for which in ("keys", "values"):
        assert difference(with_scrambled_pages(model, which), honest[:, -1:]) > 1e-2, which


def with_scrambled_pages(model: Any, which: str) -> Tensor:
    """The last token's logits, every page's keys or values turned over before it."""
    cache = kvquant_compile.new_cache(model)
    with torch.no_grad(), kvquant_compile.quantised_attention(model):
        model(IDS[:, :-1], past_key_values=cache)
        for layer in cache.pages:
            layout = layer.layout
            if isinstance(layout, BlockLayout):
                section = layout.sections[0 if which == "keys" else 1]
                start, end = section.start, section.end
            else:
                start, end = layout.offsets[f"{which[:-1]}_codes"]
            for slab in layer.slabs:
                slab[..., start:end] ^= 0x81
        return model(IDS[:, -1:], past_key_values=cache).logits


@EVERY
def test_generation_in_steps_reads_what_one_pass_reads(name: str) -> None:
    """Appending token by token ends in the same cache as a single pass, and goes on equally."""
    model = optimised(name)
    whole, pieces = kvquant_compile.new_cache(model), kvquant_compile.new_cache(model)
    with torch.no_grad():
        model(IDS[:, :140], past_key_values=whole)
        for start, stop in ((0, 139), (139, 140)):
            model(IDS[:, start:stop], past_key_values=pieces)
    first = slice(0, 1)  # deeper layers see different roundings of the step's own tokens
    for a, b in zip(whole.pages[first], pieces.pages[first], strict=True):
        assert [x.shape for x in a.slabs] == [x.shape for x in b.slabs]
        close = sum(int((x != y).sum()) for x, y in zip(a.slabs, b.slabs, strict=True))
        assert close <= 0.002 * sum(x.numel() for x in a.slabs)
    out = model.generate(IDS[:, :20], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 23)


@EVERY
def test_padding_is_not_stored(name: str) -> None:
    model = optimised(name)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, :70] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone, _ = quantised(model, IDS[1:, 70:])
    cache = kvquant_compile.new_cache(model)
    with torch.no_grad(), kvquant_compile.quantised_attention(model):
        together = model(
            IDS, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits
    assert difference(together[1:, 70:], alone) < 1e-3


@pytest.mark.parametrize(
    ("make", "model_type"),
    [
        (int_per_token, "gpt_neox"),
        (int_per_token, "gemma2"),  # a sliding window in every other layer
        (functools.partial(kivi, window=0), "llama"),
    ],
    ids=["int, gpt_neox", "int, gemma2", "kivi, llama"],
)
def test_the_paged_program_equals_the_simulation(
    make: Callable[..., Recipe], model_type: str
) -> None:
    model = kvquant_compile.optimize(tiny(model_type), 3, recipe=make)
    captured = capture(tiny(model_type))
    simulated = fake_logits(captured, recognise(captured), RoundTrip(make(3)))
    for row in IDS:
        assert difference(quantised(model, row[None])[0], simulated(row[None])) < 1e-4


def test_a_crop_goes_back_even_behind_the_exact_tail() -> None:
    model = kvquant_compile.optimize(tiny("llama"), recipe=kivi(2, group=32, window=32))
    whole, cut = kvquant_compile.new_cache(model), kvquant_compile.new_cache(model)
    with torch.no_grad():
        model(IDS[:, :70], past_key_values=whole)
        model(IDS, past_key_values=cut)
        cut.crop(-80)
        following = [model(IDS[:, 70:71], past_key_values=c).logits for c in (whole, cut)]
        assert difference(following[1], following[0]) < 0.5  # 6 keys exact in one, packed in one
        model(IDS[:, 71:], past_key_values=whole)
        model(IDS[:, 71:], past_key_values=cut)
        following = [model(IDS[:, :1], past_key_values=c).logits for c in (whole, cut)]
    assert difference(following[1], following[0]) < 0.2
    assert whole.get_seq_length() == cut.get_seq_length() == 151


def test_beams_and_repeats_copy_the_exact_tail() -> None:
    model = kvquant_compile.optimize(tiny("llama"), recipe=kivi(2, window=64))
    cache, row = kvquant_compile.new_cache(model), kvquant_compile.new_cache(model)
    with torch.no_grad():
        model(IDS[:, :100], past_key_values=cache)
        model(IDS[1:, :100], past_key_values=row)
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
        swapped = model(IDS[[1, 1, 0], 100:101], past_key_values=cache).logits
        alone = model(IDS[1:, 100:101], past_key_values=row).logits
    assert difference(swapped[:1], alone) < 1e-4
    assert difference(swapped[1:2], alone) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_recipes_run_in_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    kvquant_compile.optimize(model, recipe=kivi(4, window=32))
    logits, cache = quantised(model)
    assert cache.pages[0].sinks.dtype == dtype
    span = ring_span(cache.pages[0].sinks)
    assert [x.tolist() for x in span] == [[118, 118], [150, 150]]
    assert difference(logits.float(), original()) < 0.2


def test_a_hand_written_decoder_takes_recipes() -> None:
    model = decoder("MatmulDecoder").eval()
    ids = IDS[:, :40]
    with torch.no_grad():
        exact = model(ids, None)[0]
        kvquant_compile.optimize(
            model, 4, recipe="rotatekv", calibration=TEXT, example_inputs=(ids, None)
        )
        with kvquant_compile.quantised_attention(model):
            got, cache = model(ids, None)
    assert 1e-3 < difference(got, exact) < 0.5
    assert cache.pages[0].layout.recipe.name == "rotatekv k4v4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "quarot"}, r"the named ones are kvquant\+, kvquant, int"),
        ({"recipe": 3}, "no name, no Recipe"),
        ({"recipe": "kivi", "slots": 1}, "slots=1 with a recipe"),
        ({"recipe": kivi(2), "bits": 3}, "has its own widths"),
        ({"recipe": kivi(2), "bits": 2.5}, "bits with a Recipe"),
        ({"recipe": "fp8", "bits": 4}, "8-bit floats"),
        ({"recipe": "int", "bits": 9}, "1 to 8"),
        ({"recipe": "int", "bits": {0: 3}}, "name every layer"),
    ],
    ids=str,
)
def test_what_a_recipe_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(OptionError, match=message):
        kvquant_compile.optimize(model, **options)
    assert "_kvquant" not in model.__dict__


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "cohere"])
def test_calibration_keys_are_rotated_as_the_model_rotates_them(model_type: str) -> None:
    """What recipes behind RoPE are fitted to without running the model again."""
    captured = capture(tiny(model_type))
    layers = recognise(captured)
    behind = stored_layers(layers, {i.plan.index: kivi(2) for i in layers})
    before = observe(captured, layers, TEXT[:2], False)
    attended = observe(captured, behind, TEXT[:2], False)
    for layer in layers:
        assert layer.plan.rope is not None
        rotated = behind_rope(before[layer.plan.index], layer.plan.rope)
        torch.testing.assert_close(rotated.keys, attended[layer.plan.index].keys)
        assert difference(before[layer.plan.index].keys, rotated.keys) > 0.1


@pytest.mark.parametrize("name", ["fp8", "qserve", "kvquant", "gear"])
def test_the_evaluation_builds_the_program_that_optimize_builds(name: str) -> None:
    options = CalibrationOptions.make()
    captured = capture(tiny("llama"))
    layers = recognise(captured)
    observed = observe(captured, layers, TEXT, True)
    recipe, bits = RECIPES[name]
    built = build(Prepared(captured, layers, observed, {}, {}), choose(recipe, bits), options)
    logits = program_logits(captured, built)[0](IDS)
    assert difference(logits, quantised(optimised(name))[0]) < 1e-4
