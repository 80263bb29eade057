"""A dozen types end to end, and with --slow all of them: what docs/survey.md says still holds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.survey.case import FAILED, WRONG, Outcome, examine, in_child
from tests.survey.shrink import tiny_config
from tests.survey.table import markdown

RECORD = json.loads((Path(__file__).parents[2] / "docs/results/survey.json").read_text())
KNOWN = {row["model_type"]: Outcome(**row) for row in RECORD["types"]}
QUICK = (
    "bart", "cohere2", "deepseek_v2", "gemma3_text", "glm4", "gpt_neo", "gptj", "llama4_text",
    "mamba", "mpt", "qwen3_5_text", "smollm3",
)  # fmt: skip
REST = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(QUICK))


def _check(outcome: Outcome) -> None:
    assert not outcome.failed, outcome.why
    known = KNOWN.get(outcome.model_type)
    if known is not None and RECORD["versions"]["transformers"] == transformers.__version__:
        assert outcome.outcome == known.outcome, outcome.why
        assert outcome.rope == known.rope


@pytest.mark.parametrize("model_type", QUICK)
def test_quick_types_are_as_recorded(model_type):
    _check(examine(model_type, generate=False))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REST)
def test_all_types_are_as_recorded(model_type):
    _check(in_child(lambda: examine(model_type), model_type, 300))


def test_no_type_is_accepted_wrongly():
    assert not [outcome.model_type for outcome in KNOWN.values() if outcome.failed]
    assert len(KNOWN) >= 189


def test_every_refusal_says_what_to_do():
    for outcome in KNOWN.values():
        assert outcome.why or outcome.outcome == "rewritten", outcome.model_type


def test_layers_that_stay_are_one_of_every_kind():
    config = tiny_config("qwen3_next")
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.num_hidden_layers == 2
    assert tiny_config("llama").vocab_size == 128


def test_a_child_that_dies_or_hangs_is_an_outcome():
    died = in_child(_die, "dies", 10)
    assert died.outcome == WRONG
    assert "signal 9" in died.why
    assert "signal 14" in in_child(_forever, "hangs", 1).why


def _die() -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _forever() -> Outcome:
    while True:
        pass


def test_the_page_counts_and_groups():
    rows = [
        Outcome("a", "rewritten", rope=["half 16/16"], relative_error=1e-7, generated="yes"),
        Outcome("b", "refused", "UnsupportedLayerError: x [layer 3]: layer 3 is odd. Do."),
        Outcome("c", "refused", "UnsupportedLayerError: x [layer 7]: layer 7 is odd. Do."),
        Outcome("d", FAILED, "ValueError: no"),
        Outcome("e", "refused", "it is no decoder with a key-value cache"),
    ]
    page = markdown(rows, {"torch": "1", "transformers": "2"})
    assert "| **have one** | **3** |" in page
    assert "* refused: b, c. x: layer n is odd. Do." in page
    assert "| a | rewritten | half 16/16 | 1e-07 | yes |" in page
