"""lm-eval's scores are the quantised cache's: they change with its tables."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvquant_compile
from kvquant_compile import OptionError
from kvquant_compile.evaluate.lm_eval_model import lm_eval_model
from kvquant_compile.evaluate.score import quantised_attention

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
NEEDS = "needs lm-eval, of the extra eval"
DEMO = Path(kvquant_compile.__file__).parent / "assets" / "demo"
STORIES = (DEMO / "heldout.txt").read_text().split()
WORDS = 40


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    """The evaluator and its class for transformers models."""
    evaluator = pytest.importorskip("lm_eval.evaluator", reason=NEEDS)
    pytest.importorskip("lm_eval.models.huggingface", reason=NEEDS)
    return evaluator


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    ids = tokenizer(" ".join(STORIES[:400]), return_tensors="pt").input_ids
    kvquant_compile.optimize(model, bits=3, calibration=[ids[:, :256]])
    return model, tokenizer


def tasks(folder: Path) -> list[dict[str, Any]]:
    """A choice between the true next word and another, and a perplexity; both of local text."""
    docs = []
    for i in range(2):
        start = 400 + i * 150
        docs.append(
            {
                "context": " ".join(STORIES[start : start + WORDS]),
                "choices": [STORIES[start + WORDS], STORIES[start + WORDS + 40]],
                "text": " ".join(STORIES[start : start + WORDS]),
            }
        )
    path = folder / "docs.jsonl"
    path.write_text("\n".join(json.dumps(doc) for doc in docs))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
    }
    choice = {
        **common,
        "task": "next_word",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    perplexity = {
        **common,
        "task": "story",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    return [choice, perplexity]


def scores(lm_eval: Any, lm: Any, folder: Path) -> tuple[list[float], float]:
    """(loglikelihoods of the choices, word perplexity)."""
    found = lm_eval.simple_evaluate(
        model=lm, tasks=tasks(folder), bootstrap_iters=0, verbosity="ERROR"
    )
    samples = found["samples"]["next_word"]
    choices = [float(answer[0]) for s in samples for answer in s["filtered_resps"]]
    return choices, found["results"]["story"]["word_perplexity,none"]


def corrupted(model: Any) -> Any:
    """The same model with tables in which all levels of the values are one."""
    artifact = kvquant_compile.artifact(model)
    tables = {
        index: dataclasses.replace(t, value_table=torch.zeros_like(t.value_table))
        for index, t in artifact.tables.items()
    }
    other = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    spoilt = dataclasses.replace(artifact, tables=tables)
    return kvquant_compile.optimize(other, calibration=spoilt)


def test_scores_use_the_quantised_cache(
    lm_eval: Any, demo: tuple[Any, Any], tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = demo
    choices, perplexity = scores(lm_eval, lm_eval_model(model, tokenizer, batch_size=2), tmp_path)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    exact = scores(lm_eval, plain, tmp_path)
    assert choices != exact[0]
    assert perplexity != exact[1]
    assert perplexity == pytest.approx(exact[1], rel=0.2)
    spoilt = corrupted(model)
    broken = scores(lm_eval, lm_eval_model(spoilt, tokenizer, batch_size=2), tmp_path)
    assert broken[1] > 1.5 * perplexity
    trap = HFLM(pretrained=spoilt, tokenizer=tokenizer, batch_size=2)
    assert scores(lm_eval, trap, tmp_path) == exact, "lm-eval's own class reads nothing it wrote"


def test_loglikelihoods_are_those_of_the_model_itself(lm_eval: Any, demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    lm = lm_eval_model(model, tokenizer)
    from lm_eval.api.instance import Instance

    context, answer = " ".join(STORIES[600:640]), " " + STORIES[640]
    request = Instance("loglikelihood", {}, (context, answer), 0)
    ((found, _),) = lm.loglikelihood([request], disable_tqdm=True)
    (before, target), _ = lm._encode_pair(context, answer), None
    ids = torch.tensor([before + target])
    with torch.no_grad(), quantised_attention(model):
        logits = model(ids[:, :-1], use_cache=True).logits.log_softmax(-1)[0, -len(target) :]
    expected = logits.gather(1, torch.tensor(target)[:, None]).sum()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_a_model_in_training_is_refused(lm_eval: Any, demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    lm = lm_eval_model(model, tokenizer)
    model.train()
    try:
        with pytest.raises(OptionError, match="would not use"):
            lm._model_call(torch.zeros(1, 4, dtype=torch.int64))
    finally:
        model.eval()


def test_a_model_that_is_not_optimised_is_refused() -> None:
    with pytest.raises(OptionError, match="not optimised"):
        lm_eval_model(torch.nn.Linear(1, 1), None)


def test_without_lm_eval_the_error_says_what_to_install(
    demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvquant_compile.evaluate import lm_eval_model as module

    module._model_class.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.models.huggingface", None)
    with pytest.raises(kvquant_compile.MissingDependencyError, match=r"kvquant-compile\[eval\]"):
        lm_eval_model(*demo)
    module._model_class.cache_clear()
