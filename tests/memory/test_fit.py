"""``optimize(model, context=..., memory=...)``."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile import OptionError, memory_report
from kvquant_compile.runtime.installed import ATTRIBUTE
from tests.zoo import tiny, tokens

TEXT = tokens(4, 64, seed=7)
CONTEXT, BATCH = 2000, 4


def network() -> PreTrainedModel:
    return tiny("llama", max_position_embeddings=8192)


def needed(bits: int) -> int:
    """Bytes of the model at a width."""
    model = kvquant_compile.optimize(network(), bits=bits, calibration=TEXT)
    return memory_report(model, CONTEXT, BATCH).bytes()


def fitted(memory: int, **options: Any) -> PreTrainedModel:
    options = {"calibration": TEXT, "context": CONTEXT, "batch": BATCH, **options}
    return kvquant_compile.optimize(network(), memory=memory, **options)


def widths(model: PreTrainedModel) -> set[float]:
    report = kvquant_compile.explain(model)
    return {bits for x in report.layers for bits in (x.key_bits, x.value_bits)}


def test_the_widest_format_that_fits() -> None:
    memory = needed(4)
    for room, expected in ((memory, 4), (memory - 1, 3)):
        model = fitted(room)
        assert widths(model) == {expected}
        assert memory_report(model, CONTEXT, BATCH).bytes() <= room


@pytest.mark.slow
def test_auto_spends_the_memory() -> None:
    memory = (needed(2) + needed(3)) // 2
    model = fitted(memory, bits="auto", allocation="fisher")
    taken = memory_report(model, CONTEXT, BATCH).bytes()
    assert needed(2) < taken <= memory


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    least = needed(1)
    model = network()
    before = set(model.model.__dict__)
    with pytest.raises(OptionError, match=r"do not fit .* At 1 bit [\d,]+ tokens fit") as caught:
        kvquant_compile.optimize(
            model, context=CONTEXT, memory=least - 50_000, batch=BATCH, calibration=TEXT
        )
    assert ATTRIBUTE not in model.__dict__
    assert set(model.model.__dict__) == before
    tokens_that_fit = int(caught.value.do.split("At 1 bit ")[1].split(" ")[0].replace(",", ""))
    assert 0 < tokens_that_fit < CONTEXT
    with pytest.raises(OptionError, match="nothing fits"):
        fitted(1000)


@pytest.mark.slow
def test_given_widths_and_artifacts_are_checked() -> None:
    memory = needed(3)
    model = fitted(memory, bits=3)
    assert widths(model) == {3}
    tables = kvquant_compile.artifact(model)
    assert widths(fitted(memory, calibration=tables)) == {3}
    for options in ({"bits": 4}, {"bits": 3, "memory": memory - 1}):
        with pytest.raises(OptionError, match="do not fit"):
            fitted(**{"memory": memory, **options})


@pytest.mark.parametrize(
    "options", [{"context": 100}, {"memory": "1 GB"}, {"context": 100, "memory": "lots"},
                {"context": 0, "memory": "1 GB"}, {"context": 9, "memory": 9**9, "batch": 0}],
)  # fmt: skip
def test_half_a_request_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        kvquant_compile.optimize(network(), calibration=TEXT, **options)
