"""Mutants of real rotary code: proved only where they still rotate, else refused.

The full table is ``python -m tests.mutation.table``; docs/proof.md says what it showed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvquant_compile.capture import capture
from kvquant_compile.passes import recognise
from tests import zoo
from tests.mutation.edits import edits, source_tree
from tests.mutation.originals import originals
from tests.mutation.table import LIVE, judge_original
from tests.mutation.verdict import (
    BEFORE,
    BEHIND,
    REFUSED,
    WRONG,
    judge,
    mutants,
    outputs,
    rotates,
)

ORIGINALS = originals()


def test_every_edit_is_another_function() -> None:
    function = ORIGINALS["llama"].functions[0][0].apply_rotary_pos_emb
    found = list(edits(function))
    assert len({edit.where for edit in found}) > 20
    assert len({edit.kind for edit in found}) > 10
    assert source_tree(function).decorator_list == []


def test_a_mutant_replaces_the_function_only_while_it_is_judged() -> None:
    original = ORIGINALS["llama"]
    module, names = original.functions[0]
    before = getattr(module, names[0])
    mutant = next(m for m in mutants(original) if m.edit.kind == "minus dropped")
    model = original.build()
    outcome = judge(mutant, model, outputs(original, model))
    assert outcome.verdict in LIVE
    assert outcome.verdict not in (BEFORE, *WRONG)
    assert getattr(module, names[0]) is before


def test_the_independent_check_sees_another_rotation() -> None:
    captured = zoo.captured_decoder("SeparateDecoder")
    (layer, _) = recognise(captured)
    assert rotates(captured, layer)
    faster = tuple(1.01 * f for f in layer.plan.rope.frequencies)
    wrong = replace(layer.plan, rope=replace(layer.plan.rope, frequencies=faster))
    assert not rotates(captured, replace(layer, plan=wrong))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("position plus 1", "different embeddings"), ("frequencies doubled", "different embeddings")],
)
def test_a_key_that_turns_otherwise_than_its_query(kind: str, expected: str) -> None:
    original = ORIGINALS["SeparateDecoder"]
    model = original.build()
    unchanged = outputs(original, model)
    chosen = [m for m in mutants(original) if m.edit.kind == kind and m.name == "attention"]
    outcome = judge(chosen[-1], model, unchanged)
    assert outcome.verdict not in (BEFORE, *WRONG)
    assert expected in outcome.reason or "no proved rotary" in outcome.reason


@pytest.mark.parametrize(
    "where", ["return (q_embed, k_embed.bfloat16", "torch.cat((-x2, x1), dim=-1).bfloat16"]
)
def test_a_model_of_single_precision_means_its_roundings(where: str) -> None:
    """What half precision would forgive: the key, or its rotated half, rounded to bfloat16."""
    original = ORIGINALS["llama"]
    model = original.build()
    (mutant,) = (
        m for m in mutants(original)
        if m.edit.kind == "rounded" and where in m.edit.where.split(" -> ")[1]
    )  # fmt: skip
    outcome = judge(mutant, model, outputs(original, model))
    assert outcome.verdict == BEHIND
    assert "the graph differs from the proved rotation" in outcome.reason


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ORIGINALS)
def test_no_false_acceptance(name: str) -> None:
    outcomes = judge_original(ORIGINALS[name], 60)
    assert [str(o.mutant) for o in outcomes if o.verdict in WRONG] == []
    assert sum(outcome.verdict in LIVE for outcome in outcomes) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
def test_no_original_is_refused(name: str) -> None:
    original = ORIGINALS[name]
    captured = capture(original.build(), (zoo.tokens(), None) if original.handwritten else None)
    for layer in recognise(captured):
        assert layer.plan.refusal == ""
        assert rotates(captured, layer)


@pytest.mark.parametrize(
    ("name", "where"), [("IsCausalDecoder", "k -> q"), ("SeparateDecoder", "key -> query")]
)
def test_more_heads_of_keys_than_of_values_are_refused(name: str, where: str) -> None:
    original = ORIGINALS[name]
    model = original.build()
    chosen = [
        m for m in mutants(original) if m.edit.kind == "another tensor" and where == m.edit.where
    ]
    unchanged = outputs(original, model)
    outcomes = [judge(mutant, model, unchanged) for mutant in chosen]
    assert not {outcome.verdict for outcome in outcomes} & set(WRONG)
    refused = [outcome.reason for outcome in outcomes if outcome.verdict == REFUSED]
    assert any("4 heads of keys and 2 of values" in reason for reason in refused)
