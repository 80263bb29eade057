"""Scores measure the cache: sabotage moves them, lossless storage does not, simulations agree."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.calib.observe import observe
from kvquant_compile.capture import Captured, capture
from kvquant_compile.codec.keys import dequantise_keys, quantise_keys
from kvquant_compile.codec.spec import CodecSpec, LayerTables
from kvquant_compile.codec.values import dequantise_values, quantise_values
from kvquant_compile.config import FormatOptions
from kvquant_compile.evaluate import run
from kvquant_compile.evaluate.baselines import Fp8, KVQuantReleased, RoundTrip
from kvquant_compile.evaluate.fake import FakeCodec, fake_logits
from kvquant_compile.evaluate.run import Prepared, build, prepare
from kvquant_compile.evaluate.score import score, summary
from kvquant_compile.evaluate.table import (
    Row,
    baseline_codecs,
    evaluate_table,
    program_logits,
    render,
)
from kvquant_compile.lowering import ops
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.progress import Progress
from kvquant_compile.recipes import int_per_token, kivi
from kvquant_compile.runtime.program import Program
from kvquant_compile.runtime.validate import lossless_program
from tests.zoo import captured_decoder, tiny, tokens, unproved

TEXT = list(tokens(4, 96, seed=7).split(1))
WINDOWS = list(tokens(2, 90, seed=2).split(1))
OPTIONS = CalibrationOptions.make(windows=4)
WIDTHS = (1, 2, 3, 4, 8, 16)


def prepared(captured: Captured) -> Prepared:
    layers = recognise(captured)
    return Prepared(captured, layers, observe(captured, layers, TEXT, True), {}, {})


@pytest.fixture(scope="module")
def llama() -> Prepared:
    return prepared(capture(tiny("llama")))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def original(source: Prepared) -> Callable[[Tensor], Tensor]:
    """The captured original, every key and value passed through a codec that changes nothing."""

    class Same(Fp8):
        def keys(self, x: Tensor, layer: int) -> Tensor:
            return x

    return fake_logits(source.captured, source.layers, Same())


def with_appends(program: Program, change: Callable[..., tuple[Tensor, Tensor]]) -> Program:
    """A program that stores ``change(key, value)`` instead of key and value."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph_module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=ops.append):
        with graph.inserting_before(node):
            pair = graph.call_function(change, node.args[:2])
            for i in (0, 1):
                part = graph.call_function(lambda pair, i: pair[i], (pair, i))
                node.update_arg(i, part)
    return dataclasses.replace(program, graph_module=fx.GraphModule(program.graph_module, graph))


def with_shuffled_pages(program: Program) -> Program:
    """A program whose attention reads each layer's pages in reverse order."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph_module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=ops.attend):
        with graph.inserting_before(node):
            node.update_arg(5, graph.call_function(lambda t: t.flip(1), (node.args[5],)))
    return dataclasses.replace(program, graph_module=fx.GraphModule(program.graph_module, graph))


SABOTAGES: dict[str, Callable[[Program], Program]] = {
    "zeroed values": lambda p: with_appends(p, lambda k, v: (k, torch.zeros_like(v))),
    "zeroed keys": lambda p: with_appends(p, lambda k, v: (torch.zeros_like(k), v)),
    "shuffled pages": with_shuffled_pages,
}


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_sabotage_changes_every_score(llama: Prepared, bits: int) -> None:
    program = build(llama, FormatOptions(bits), OPTIONS)
    candidates = {"honest": program_logits(llama.captured, program)[0]}
    for name, sabotage in SABOTAGES.items():
        candidates[name] = program_logits(llama.captured, sabotage(program))[0]
    scores = score(original(llama), candidates, WINDOWS)
    for name in SABOTAGES:
        assert abs(scores[name].perplexity / scores["honest"].perplexity - 1) > 1e-3, name
        assert abs(scores[name].kl - scores["honest"].kl) > 1e-3, name


def test_standard_errors_are_of_paired_windows() -> None:
    """What makes one window harder than another is in the original's loss too, and cancels."""
    original = torch.tensor([[2.0, 0, 1], [6.0, 0, 1], [4.0, 0, 1]], dtype=torch.float64)
    codec = original + torch.tensor([[0.1, 0.2, 0], [0.1, 0.4, 0], [0.4, 0.3, 0]])
    found = summary(codec, original, 30)
    assert found.loss_error == pytest.approx(0.1)  # deviation of 0.1, 0.1, 0.4 over sqrt(3)
    assert found.kl_error == pytest.approx(0.1 / 3**0.5)
    row = Row("codec", 3, 3.4, None, found, 20.0)
    assert row.loss_error == pytest.approx(12.0)  # percent of a perplexity that is 1.2 times it
    assert "+20.00 ± 12.00 %" in text_of(render([row], "table"))
    single = Row("codec", 3, 3.4, None, summary(codec[:1], original[:1], 10), 20.0)
    assert single.loss_error is None
    assert "+20.00 %" in text_of(render([single], "table"))


def text_of(table: Table) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_lossless_storage_scores_as_the_original(llama: Prepared) -> None:
    program = lossless_program(llama.captured, llama.layers)
    rows = evaluate_table(llama.captured, llama.layers, {"lossless": (16, program)}, {}, WINDOWS)
    first, last = rows
    assert last.score.perplexity == pytest.approx(first.score.perplexity, rel=1e-5)
    assert last.score.kl < 1e-6
    assert last.score.top1 == 1.0
    assert (first.score.windows, first.score.tokens) == (2, 178)


def test_the_original_row_is_the_models_own_perplexity(llama: Prepared) -> None:
    rows = evaluate_table(llama.captured, llama.layers, {}, {}, WINDOWS)
    losses = []
    for ids in WINDOWS:
        with torch.no_grad():
            losses.append(llama.captured.model(ids, labels=ids, use_cache=False).loss)
    expected = float(torch.stack(losses).mean().exp())
    assert rows[0].score.perplexity == pytest.approx(expected, rel=1e-5)


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our own codec as a round trip, without pages: leading tokens exact."""

    specs: Mapping[int, CodecSpec]
    tables: Mapping[int, LayerTables]
    pre_rope: bool = True

    def keys(self, x: Tensor, layer: int) -> Tensor:
        spec, tables = self.specs[layer], self.tables[layer]
        codes = quantise_keys(x, tables, spec)
        return self._with_sinks(x, dequantise_keys(codes, tables, spec), spec)

    def values(self, x: Tensor, layer: int) -> Tensor:
        spec, tables = self.specs[layer], self.tables[layer]
        codes = quantise_values(x, tables, spec)
        return self._with_sinks(x, dequantise_values(codes, tables, spec), spec)

    def effective_bits(self, heads: int, dim: int, tokens: int) -> float:
        return 0.0

    def _with_sinks(self, x: Tensor, read: Tensor, spec: CodecSpec) -> Tensor:
        return torch.cat([x[:, :, : spec.sink_tokens], read[:, :, spec.sink_tokens :]], 2)


SIMULATED = ("llama", "gemma2", "gpt_neox", "cohere", "gpt2", "MatmulDecoder", "WindowDecoder")


@pytest.mark.parametrize("name", SIMULATED)
def test_the_paged_program_equals_the_simulation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prepared(captured_decoder(name) if "Decoder" in name else capture(tiny(name)))
    made: list[Any] = []
    fit = run.fit_artifact
    monkeypatch.setattr(run, "fit_artifact", lambda *a: made.append(fit(*a)) or made[-1])
    ids = tokens(1, 150, seed=3)
    exact = original(source)(ids)
    for bits, slots, sinks in (((3, 2), 1, 1), ((4, 4), 0, 3)):
        program = build(source, FormatOptions(bits, slots, sinks, 0), OPTIONS)
        codec = Ours(made[-1].specs, made[-1].tables)
        simulated = fake_logits(source.captured, source.layers, codec)(ids)
        paged = program_logits(source.captured, program)[0](ids)
        assert error(paged, simulated) < 1e-4
        assert error(paged, exact) > 1e-2


def test_the_paged_program_equals_the_simulation_without_rope_moved() -> None:
    """Keys kept rotated: nothing before RoPE may be touched."""
    source = prepared(capture(unproved()))
    assert all(layer.plan.refusal for layer in source.layers)
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        fit = run.fit_artifact
        patch.setattr(run, "fit_artifact", lambda *a: made.append(fit(*a)) or made[-1])
        program = build(source, FormatOptions(3, recent_window=0), OPTIONS)
    ids = tokens(1, 100, seed=3)
    codec = Ours(made[0].specs, made[0].tables)
    simulated = fake_logits(source.captured, source.layers, codec)(ids)
    assert error(program_logits(source.captured, program)[0](ids), simulated) < 1e-4


def codec_error(source: Prepared, codec: FakeCodec) -> float:
    exact = original(source)
    got = fake_logits(source.captured, source.layers, codec)
    return max(error(got(ids), exact(ids)) for ids in WINDOWS)


@pytest.mark.parametrize(
    "make",
    [
        lambda bits: RoundTrip(int_per_token(bits)),
        lambda bits: RoundTrip(kivi(bits, group=32, window=0)),
        None,
    ],
    ids=["int per token", "kivi", "kvquant as released"],
)
def test_baselines_lose_less_with_more_bits(llama: Prepared, make: Any) -> None:
    fit = make or (lambda bits: KVQuantReleased.fit(llama.observed, bits))
    errors = [codec_error(llama, fit(bits)) for bits in (2, 3, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1] > 0
    sizes = [fit(bits).effective_bits(2, 16, 64) for bits in (2, 3, 4, 6)]
    assert sizes == sorted(sizes)
    assert all(size > bits for size, bits in zip(sizes, (2, 3, 4, 6), strict=True))


def test_fp8_is_close_to_the_original_and_not_equal(llama: Prepared) -> None:
    assert 1e-4 < codec_error(llama, Fp8()) < 0.7 * codec_error(llama, RoundTrip(int_per_token(4)))


@pytest.mark.parametrize("keys", [True, False])
def test_a_fake_codec_reaches_keys_and_values_of_every_layout(keys: bool) -> None:
    """Keys that a decoder keeps as [B, S, H, D] are read by nothing in head layout."""

    class Doubled(Fp8):
        def keys(self, x: Tensor, layer: int) -> Tensor:
            assert x.shape[1] == 2
            return 2 * x if keys else x

        def values(self, x: Tensor, layer: int) -> Tensor:
            assert x.shape[1] == 2
            return x if keys else 2 * x

    for name in ("MatmulDecoder", "SdpaDecoder"):
        source = captured_decoder(name)
        layers = recognise(source)
        ids = WINDOWS[0]
        with torch.no_grad():
            exact = source.model(ids, None)[0]
        for pre_rope in (True, False):
            got = fake_logits(source, layers, Doubled(pre_rope))(ids)
            assert error(got, exact) > 0.01


def test_the_table_lists_everything_once_and_renders() -> None:
    with Progress(False) as bar:
        source = prepare(tiny("llama"), torch.cat(TEXT), None, OPTIONS, bar)
    programs = {f"ours, {b} bits": (b, build(source, FormatOptions(b), OPTIONS)) for b in (4, 2)}
    codecs = baseline_codecs([4, 2], source.observed)
    rows = evaluate_table(source.captured, source.layers, programs, codecs, WINDOWS)
    names = [row.name for row in rows]
    assert names == ["original", "fp8 e4m3",
                     "int4 per token", "int4 (g32)", "kivi-4 (g64)", "kvquant-4 (code)",
                     "int2 per token", "int2 (g32)", "kivi-2 (g64)", "kvquant-2 (code)",
                     "ours, 4 bits", "ours, 2 bits"]  # fmt: skip
    by_name = {row.name: row for row in rows}
    ours = by_name["ours, 2 bits"]
    elements = 90 * 2 * 2 * 2 * 16
    assert ours.cache_bytes is not None
    assert ours.effective_bits == pytest.approx(8 * ours.cache_bytes / elements)
    assert by_name["ours, 4 bits"].score.kl < ours.score.kl
    assert render(rows, "title").row_count == len(rows)


def test_smaller_groups_lose_less_and_cost_more(llama: Prepared) -> None:
    whole, grouped = (RoundTrip(int_per_token(3, group=group)) for group in (0, 8))
    assert codec_error(llama, grouped) < codec_error(llama, whole)
    assert grouped.effective_bits(2, 16, 64) == 7.0 > whole.effective_bits(2, 16, 64) == 5.0
