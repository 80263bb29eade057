"""Optimised models, and one whose steps are recorded and replayed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import PreTrainedModel

import kvquant_compile
from tests.runtime.decode_graph.helpers import TEXT, graphs
from tests.runtime.recording import Recording
from tests.zoo import tiny


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_neox", "gpt2"])
def each(request: pytest.FixtureRequest) -> PreTrainedModel:
    return kvquant_compile.optimize(tiny(request.param), bits=3, calibration=TEXT)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return kvquant_compile.optimize(tiny("llama"), bits=3, calibration=TEXT)


@pytest.fixture
def backend(llama: PreTrainedModel) -> Iterator[Recording]:
    """The model's decode steps recorded and replayed."""
    backend = Recording()
    with graphs(llama, backend):
        yield backend
