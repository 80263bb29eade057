"""Widths by sensitivity: honest losses, bytes within the budget, better than interpolation."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvquant_compile
from kvquant_compile.calib.calibrate import CalibrationOptions, fit_tables
from kvquant_compile.calib.observe import Observed, observe
from kvquant_compile.capture import Captured, capture
from kvquant_compile.demo import ASSETS
from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate.fake import fake_logits
from kvquant_compile.evaluate.stored import KEYS, VALUES
from kvquant_compile.evaluate.table import program_logits
from kvquant_compile.evaluate.text import read_text, text_windows
from kvquant_compile.inspect.report import Report
from kvquant_compile.loading import load_model
from kvquant_compile.mixed.measure import OneAtATime, fisher_losses, measured_losses
from kvquant_compile.mixed.widths import Fitted, fit_widths
from kvquant_compile.passes.recognise import MatchedLayer, recognise
from kvquant_compile.progress import Progress
from kvquant_compile.recipes import Affine, Recipe
from kvquant_compile.recipes.choice import choose, stored_layers
from kvquant_compile.runtime.program import build_program
from tests.zoo import decoder, tiny, tokens

TEXT = tokens(4, 160, seed=7)
WINDOWS = list(TEXT.split(1))
OPTIONS = CalibrationOptions.make(windows=4)
Source = tuple[Captured, tuple[MatchedLayer, ...], dict[int, Observed]]


@functools.cache
def source(model: str = "llama") -> Source:
    wide = {"hidden_size": 128} if model == "cohere" else {}  # two stages of error feedback
    captured = capture(tiny(model, **wide))
    layers = recognise(captured)
    return captured, layers, observe(captured, layers, WINDOWS, True)


@functools.cache
def fitted(recipe: str | None = None, model: str = "llama") -> Fitted:
    captured, layers, observed = source(model)
    # What is simulated has no ring; a recipe of blocks cannot be asked for one.
    choice = choose(recipe, 3, recent_window=0 if recipe is None else None)
    layers = stored_layers(layers, choice.formats([0, 1]))
    options = choice.calibration(OPTIONS)
    if layers[0].plan.kept is not None:
        observed = observe(captured, layers, WINDOWS, False)
    return fit_widths(captured, layers, choice, [2, 3, 4], observed, options, Progress(False))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("recipe", "model"),
    [*((name, "llama") for name in (None, "kvquant", "rotatekv", "int")), (None, "cohere")],
)
def test_what_is_switched_on_reads_as_pages_do(recipe: str | None, model: str) -> None:
    """Layer 0 at 3 bits, layer 1 exact: the simulation that losses come from, and packed pages."""
    captured, _, _ = source(model)
    fit = fitted(recipe, model)
    codec = OneAtATime(fit.trips(), {(0, KEYS): 3, (0, VALUES): 3})
    simulated = fake_logits(captured, fit.layers, codec)(WINDOWS[0])
    exact = fake_logits(captured, fit.layers, OneAtATime(fit.trips()))(WINDOWS[0])
    specs = {0: fit.formats[3][0], 1: choose(None, 16).formats([1])[1]}
    program = build_program(captured, fit.layers, specs, {0: fit.tables[3][0], 1: None})
    paged = program_logits(captured, program)[0](WINDOWS[0])
    assert error(simulated, paged) < 1e-4
    assert error(simulated, exact) > 1e-2


def test_losses_are_of_the_item_alone_and_fall_with_the_width() -> None:
    captured, layers, _ = source()
    trips = fitted().trips()
    losses = measured_losses(captured, layers, trips, WINDOWS[:2])
    assert set(losses) == {(i, part) for i in (0, 1) for part in (KEYS, VALUES)}
    for by_width in losses.values():
        assert by_width[2] > 2 * by_width[3] > 4 * by_width[4] > 0
    same = {name: lambda x: x for name in trips}
    assert max(x[2] for x in measured_losses(captured, layers, same, WINDOWS[:1]).values()) < 1e-9
    sabotaged = {**trips, ((1, VALUES), 4): torch.zeros_like}
    broken = measured_losses(captured, layers, sabotaged, WINDOWS[:2])
    assert broken[1, VALUES][4] > 10 * losses[1, VALUES][2]
    assert broken[0, KEYS] == losses[0, KEYS]


def test_the_proxy_ranks_widths_and_needs_gradients() -> None:
    captured, layers, observed = source()
    losses = fisher_losses(fitted().trips(), observed)
    for by_width in losses.values():
        assert by_width[2] > by_width[3] > by_width[4] > 0
    without = observe(captured, layers, WINDOWS, False)
    with pytest.raises(OptionError, match="Fisher"):
        fisher_losses(fitted().trips(), without)


@pytest.mark.parametrize("recipe", [None, "kvquant", "kivi", "gear", "qserve"])
def test_costs_add_up_to_the_bytes_of_a_mixture(recipe: str | None) -> None:
    fit = fitted(recipe)
    least = dict.fromkeys(fit.items, 2)
    picks = {(0, KEYS): 4, (0, VALUES): 2, (1, KEYS): 3, (1, VALUES): 4}
    added = sum(fit.costs(i)[fit.widths.index(w)] - fit.costs(i)[0] for i, w in picks.items())
    assert fit.page_bytes(picks) == fit.page_bytes(least) + added
    assert added > 0


@pytest.mark.parametrize("recipe", [None, "rotatekv"])
def test_mixed_tables_are_those_of_a_fit_at_these_widths(recipe: str | None) -> None:
    captured, _, observed = source()
    fit = fitted(recipe)
    picks = {(0, KEYS): 4, (0, VALUES): 2, (1, KEYS): 3, (1, VALUES): 3}
    options = fit.choice.calibration(OPTIONS)
    again = fit_tables(captured, fit.layers, fit.mixed_formats(picks), observed, options)
    for index, tables in fit.mixed_tables(picks).items():
        expected = again[index].tensors()
        assert tables.tensors().keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) for name, t in tables.tensors().items())


@functools.cache
def explained(bits: Any, **options: Any) -> Report:
    model = kvquant_compile.optimize(tiny("llama"), bits, calibration=TEXT, **options)
    return kvquant_compile.explain(model)


def widths(report: Report) -> list[float]:
    return [w for layer in report.layers for w in (layer.key_bits, layer.value_bits)]


def test_a_fraction_takes_at_most_its_bytes_and_says_so() -> None:
    two, three = explained(2).bytes_per_token, explained(3).bytes_per_token
    report = explained(2.5)
    assert two < report.bytes_per_token <= (two + three) / 2
    assert len(set(widths(report))) > 1
    assert report.calibration["mixed"]["bytes_per_token"] == report.bytes_per_token
    assert list(report.calibration["mixed"]["widths"].values()) == widths(report)
    assert "chosen for 2.5 bits" in str(report)


@pytest.mark.parametrize("budget", [5.2, "85 B"])
def test_budgets(budget: Any) -> None:
    report = explained("auto", budget=budget)
    if isinstance(budget, float):
        assert 5.2 - 0.5 <= report.effective_bits <= 5.2
    else:
        assert 85 - 8 <= report.bytes_per_token <= 85


def test_recipes_are_mixed() -> None:
    report = explained(2.5, recipe="kivi")
    assert len(set(widths(report))) > 1
    low, high = (explained(b, recipe="kivi").bytes_per_token for b in (2, 3))
    assert low < report.bytes_per_token <= (low + high) / 2
    assert report.calibration["mixed"]["expected_kl"] > 1e-4


def test_hand_written_decoders_are_mixed() -> None:
    """Keys and values that a decoder keeps in a layout of its own."""
    model = decoder("MatmulDecoder").eval()
    kvquant_compile.optimize(model, 2.5, calibration=TEXT, example_inputs=(tokens(), None))
    losses = kvquant_compile.explain(model).calibration["mixed"]["losses"]
    assert all(by_width["2"] > by_width["4"] > 0 for by_width in losses.values())
    assert len(set(widths(kvquant_compile.explain(model)))) > 1


def test_a_mixture_is_saved_with_its_tables(tmp_path: Path) -> None:
    model = kvquant_compile.optimize(tiny("llama"), 2.5, calibration=TEXT, allocation="fisher")
    kvquant_compile.artifact(model).save(tmp_path / "mixed.safetensors")
    again = kvquant_compile.optimize(tiny("llama"), calibration=tmp_path / "mixed.safetensors")
    ids = tokens(1, 90)
    outputs = []
    for each in (model, again):
        with torch.no_grad(), kvquant_compile.quantised_attention(each):
            outputs.append(each(ids).logits)
    assert torch.equal(*outputs)
    assert widths(kvquant_compile.explain(again)) == widths(kvquant_compile.explain(model))
    two = kvquant_compile.optimize(tiny("llama"), 2, calibration=TEXT)
    for made in (model, two):
        tables = kvquant_compile.artifact(made)
        with pytest.raises(OptionError, match="another format"):
            kvquant_compile.optimize(tiny("llama"), 2.5, calibration=tables)


def test_what_cannot_be_met_is_refused_first() -> None:
    with pytest.raises(OptionError, match="one bit takes"):
        explained("auto", budget=0.5)
    with pytest.raises(OptionError, match="fp8"):
        explained(2.5, recipe="fp8")
    with pytest.raises(OptionError, match="Fisher"):
        explained(2.5, allocation="fisher", sensitivity="none")
    with pytest.raises(OptionError, match="Fisher"):
        explained(2.5, allocation="fisher", recipe="rotatekv")


def test_keys_that_depend_on_the_values_width_are_refused() -> None:
    def tied(bits: int = 3, value_bits: int = 3) -> Recipe:
        return Recipe("tied", Affine(max(bits, value_bits)), Affine(value_bits))

    captured, layers, observed = source()
    choice = choose(tied, 3)
    fit = fit_widths(captured, layers, choice, [2, 3], observed, OPTIONS, Progress(False))
    fit.mixed_tables(dict.fromkeys(fit.items, 2))
    with pytest.raises(OptionError, match="depend"):
        fit.mixed_tables({**dict.fromkeys(fit.items, 2), (0, VALUES): 3})


def test_a_fraction_beats_interpolation_on_the_demo_model() -> None:
    """In divergence, through packed pages, on a text that was not calibrated on."""
    model, tokenizer = load_model(str(ASSETS), "float32")
    text = text_windows(read_text(str(ASSETS / "heldout.txt")), tokenizer, 256, 8)
    kl, sizes = {}, {}
    exact = [model(ids).logits.detach() for ids in text[:4]]
    for bits in (2, 2.5, 3):
        kvquant_compile.optimize(model, bits, calibration=torch.cat(text[4:]), windows=4)
        sizes[bits] = kvquant_compile.explain(model).bytes_per_token
        with torch.no_grad(), kvquant_compile.quantised_attention(model):
            kl[bits] = sum(
                float(
                    torch.nn.functional.kl_div(
                        model(ids).logits.log_softmax(-1), p.log_softmax(-1),
                        log_target=True, reduction="sum",
                    )
                )
                for p, ids in zip(exact, text[:4], strict=True)
            )  # fmt: skip
        kvquant_compile.restore(model)
    assert sizes[2.5] <= (sizes[2] + sizes[3]) / 2
    assert kl[2.5] < 0.8 * (kl[2] + kl[3]) / 2
