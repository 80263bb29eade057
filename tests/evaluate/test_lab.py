"""The laboratory measures the cache, in every one of its measures."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import Tensor

from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate import layer_errors
from kvquant_compile.evaluate.agreement import agreement
from kvquant_compile.evaluate.lab import Lab
from kvquant_compile.evaluate.needle import needle_cases, needle_score
from kvquant_compile.evaluate.points import Point, grid_points
from kvquant_compile.evaluate.results import Results, schema
from kvquant_compile.evaluate.run import build
from kvquant_compile.evaluate.selftest import sabotage_change, sabotaged
from kvquant_compile.evaluate.table import evaluate_table, original_logits, program_logits
from kvquant_compile.evaluate.text import read_text
from kvquant_compile.recipes import NAMED
from kvquant_compile.recipes import choice as choice_module
from kvquant_compile.recipes.choice import OURS, PUBLISHED, choose
from tests.evaluate.laboratory import OPTIONS, TEXT, Letters, laboratory

TWO = Point("kvquant+", "2")


@pytest.fixture(scope="module")
def shared() -> Lab:
    return laboratory()


@pytest.fixture(scope="module")
def long() -> Lab:
    """Windows longer than any recipe's exact tail."""
    return laboratory(window=200, limit=1)


def test_scores_are_those_of_the_table(shared: Lab) -> None:
    rows = shared.scores([Point("kivi", "2"), TWO, Point("fp8"), Point("bf16")])
    assert [row.name for row in rows] == ["original", "kivi 2", "kvquant+ 2", "fp8", "bf16"]
    source = shared.prepared
    program = build(source, choose(None, 2), OPTIONS)
    expected = evaluate_table(
        source.captured, source.layers, {"kvquant+ 2": (2, program)}, {}, shared.windows
    )
    for got, want in zip((rows[0], rows[2]), expected, strict=True):
        assert got.score.perplexity == pytest.approx(want.score.perplexity, rel=1e-6)
        assert got.score.kl == pytest.approx(want.score.kl, rel=1e-5, abs=1e-9)
        assert got.loss_percent == pytest.approx(want.loss_percent, rel=1e-4, abs=1e-9)
        assert got.score.kl_error == pytest.approx(want.score.kl_error, rel=1e-5, abs=1e-9)
        assert got.loss_error == pytest.approx(want.loss_error, rel=1e-5, abs=1e-9)
        assert got.effective_bits == want.effective_bits
        assert got.cache_bytes == want.cache_bytes
    assert rows[2].score.kl > rows[3].score.kl > rows[4].score.kl > 0
    jsonschema.validate(shared.results.to_dict(), schema())


@pytest.mark.parametrize(("recipe", "bits"), [("kvquant+", "4/2"), ("rotatekv", "3"), ("fp8", "")])
def test_what_is_shared_between_points_changes_nothing(shared: Lab, recipe: str, bits: str) -> None:
    """Tables fitted once for several points are those of a fit for this one."""
    point = Point(recipe, bits)
    alone = build(shared.prepared, point.choice()[0], OPTIONS)
    captured, ids = shared.prepared.captured, shared.windows[0]
    for other in (Point(recipe, "2"), TWO) if bits else ():
        shared.program(other)
    together = program_logits(captured, shared.program(point))[0](ids)
    assert torch.equal(together, program_logits(captured, alone)[0](ids))


def test_lossless_storage_scores_as_the_original(shared: Lab) -> None:
    _, row = shared.scores([Point("kvquant+", "16")])
    assert abs(row.loss_percent) < 1e-4
    assert abs(row.score.kl) < 1e-6
    assert row.score.top1 == 1.0


def test_a_mixture_lies_between_the_whole_widths(shared: Lab) -> None:
    _, two, between, three = shared.scores([Point("kvquant+", b) for b in ("2", "2.5", "3")])
    assert two.effective_bits < between.effective_bits < three.effective_bits
    assert between.score.kl < (two.score.kl + three.score.kl) / 2


def test_windows_of_one_pass_score_as_one_by_one(tmp_path: Path) -> None:
    points = [TWO, Point("kivi", "2"), Point("fp8"), Point("kvquant-released", "3")]
    path = tmp_path / "results.json"
    whole = laboratory(path, limit=1)
    whole.scores(points)
    several = whole.on(TEXT, 100, 5, batch=2)  # the first pass has a window that is known
    several.score(points, 3)
    assert several.source is whole.source
    alone = whole.on(TEXT, 100, 5)
    alone.results = Results()
    for got, want in zip(several.scores(points), alone.scores(points), strict=True):
        assert got.score.windows == want.score.windows == 5
        assert got.score.kl == pytest.approx(want.score.kl, rel=1e-4, abs=1e-9)
        assert got.score.perplexity == pytest.approx(want.score.perplexity, rel=1e-6)
        assert got.effective_bits == want.effective_bits
        assert got.cache_bytes == want.cache_bytes


def test_sabotage_of_the_cache_changes_every_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def measures(lab: Lab) -> tuple[float, list[float], list[float], list[float]]:
        return (
            lab.scores([TWO])[1].score.kl,
            [entry["loss"] for entry in lab.needle(TWO)["depths"]],
            [run["share"] for run in lab.agreement(TWO, 40)["runs"]],
            [item["kl"] for item in lab.errors(TWO)["items"]],
        )

    honest = measures(laboratory(window=200))
    program, trip = Lab.program, layer_errors.round_trip
    monkeypatch.setattr(Lab, "program", lambda lab, point: sabotaged(program(lab, point)))
    monkeypatch.setattr(
        layer_errors, "round_trip",
        lambda plan, spec, tables, part, **o: torch.zeros_like if part == "values"
        else trip(plan, spec, tables, part, **o),
    )  # fmt: skip
    broken = measures(laboratory(window=200))
    assert broken[0] > 2 * honest[0]
    assert broken[1] != pytest.approx(honest[1], rel=1e-3)
    assert sum(broken[2]) < sum(honest[2])
    assert all(b > 5 * h for b, h in zip(broken[3][1::2], honest[3][1::2], strict=True))
    assert broken[3][::2] == honest[3][::2]


@pytest.mark.parametrize("recipe", [OURS, PUBLISHED, *NAMED])
def test_no_recipe_is_silently_the_original(
    recipe: str, long: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every recipe's scores come from what it stores: its errors show, and so does sabotage."""
    few = functools.partial(NAMED["rvq"], entries=16, steps=2)
    monkeypatch.setattr(choice_module, "NAMED", {**NAMED, "rvq": few})
    program = long.program(Point(recipe, "" if recipe == "fp8" else "2"))
    captured, ids = long.prepared.captured, long.windows[0]
    exact = original_logits(captured)(ids)
    read = program_logits(captured, program)[0](ids)
    assert float((read - exact).norm() / exact.norm()) > 3e-3
    assert sabotage_change(captured, program) > 1e-2


def test_agreement_ends_where_a_generation_of_its_own_leaves_the_original(shared: Lab) -> None:
    logits, _ = shared.candidate(TWO)
    runs = shared._greedy(40)
    for ids, found in zip(runs, agreement(logits, runs, 40), strict=True):
        own = ids[:, :-40]
        for _ in range(40):
            own = torch.cat([own, logits(own)[:, -1:].argmax(-1)], 1)
        alike = (own == ids)[0, -40:].long().cumprod(0).sum()
        assert found["same"] == int(alike)
    assert shared.agreement(Point("kvquant+", "16"), 40)["runs"] == [
        {"same": 40, "share": 1.0}
    ] * len(runs)
    assert min(run["same"] for run in shared.agreement(TWO, 40)["runs"]) < 40


def test_needles_lie_at_their_depth() -> None:
    hay = torch.zeros(900, dtype=torch.int64)
    cases = needle_cases(hay, Letters(), 200)
    question = Letters()(" The secret number of")["input_ids"]
    width = len(question)
    for case in cases:
        ids = case.ids[0].tolist()
        assert len(ids) == 200
        starts = [i for i in range(200 - width) if ids[i : i + width] == question]
        assert len(starts) == 2
        first, second = starts
        answer = ids[-case.answer :]
        where = 200 - case.answer - second  # tokens from the question's start to the answer
        assert ids[first + where : first + where + case.answer] == answer
        free = sum(token == 0 for token in ids)
        assert sum(token == 0 for token in ids[:first]) == round(case.depth * free)
    assert len({tuple(c.ids[0, -c.answer :].tolist()) for c in cases}) == 3


def test_needles_are_scored_by_the_answer_alone() -> None:
    cases = needle_cases(torch.zeros(900, dtype=torch.int64), Letters(), 200, depths=(0.0, 1.0))

    def knowing(ids: Tensor) -> Tensor:
        return 50 * torch.nn.functional.one_hot(ids.roll(-1, 1), 128).float()

    def wrong(ids: Tensor) -> Tensor:
        out = knowing(ids)
        out[:, 194 - 1 : -1] = 0  # six characters of the answer: a blank and five digits
        return out

    for entry in needle_score(knowing, cases):
        assert entry["accuracy"] == 1.0
        assert entry["loss"] < 1e-6
    assert [e["depth"] for e in needle_score(wrong, cases)] == [0.0, 1.0]
    assert all(e["accuracy"] == 0 and e["loss"] > 4 for e in needle_score(wrong, cases))
    with pytest.raises(OptionError, match="haystacks"):
        needle_cases(torch.zeros(900, dtype=torch.int64), Letters(), 400)


def test_errors_name_layers_heads_and_channels(shared: Lab) -> None:
    value = shared.errors(TWO)
    assert value["weights"] == "fisher"
    assert [(i["layer"], i["part"]) for i in value["items"]] == [
        (0, "keys"), (0, "values"), (1, "keys"), (1, "values")
    ]  # fmt: skip
    for item in value["items"]:
        assert item["kl"] > 0
        assert sum(head["share"] for head in item["heads"]) == pytest.approx(1, abs=1e-5)
        for head in item["heads"]:
            shares = [channel["share"] for channel in head["channels"]]
            assert shares == sorted(shares, reverse=True)
    assert shared.errors(Point("int", "2"))["weights"] == "none"
    finer = shared.errors(Point("kvquant+", "3"))
    assert sum(i["kl"] for i in finer["items"]) < 0.6 * sum(i["kl"] for i in value["items"])
    assert shared.errors(Point("kvquant+", "16"))["items"] == []
    jsonschema.validate(shared.results.to_dict(), schema())


def test_a_grid_falls_along_both_axes(shared: Lab) -> None:
    rows = shared.scores(grid_points("kvquant+", [2, 4]))[1:]
    kl = [row.score.kl for row in rows]
    assert kl[0] > max(kl[1], kl[2])
    assert min(kl[1], kl[2]) > kl[3]


def test_documents_are_read_from_jsonl(tmp_path: Path) -> None:
    """C4 comes as one document a line."""
    path = tmp_path / "sample.jsonl"
    path.write_text('{"text": "one\\ntwo", "url": "a"}\n{"text": "thr\u2028ee"}\n', "utf-8")
    assert read_text(path) == "one\ntwo\n\nthr\u2028ee"
    for wrong in ('{"content": "x"}', "no json", "[1]"):
        path.write_text(wrong)
        with pytest.raises(OptionError, match="cannot read the text"):
            read_text(path)


def test_the_schema_refuses_damaged_results(shared: Lab) -> None:
    shared.scores([TWO])
    good = shared.results.to_dict()
    for damage in (
        lambda r: r["value"].pop("windows"),
        lambda r: r["identity"].pop("model"),
        lambda r: r["value"]["windows"][0].update(kl="small"),
        lambda r: r["identity"].update(measure="guess"),
    ):
        bad = json.loads(json.dumps(good))
        damage(next(r for r in bad["results"] if r["identity"]["measure"] == "score"))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema())
