"""A model at 3 bits, the logits of the original, and a model that must stay as it is."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import kvquant_compile
from tests.api.helpers import TEXT, logits
from tests.api.untouched import Untouched
from tests.zoo import tiny


@pytest.fixture(scope="module")
def three() -> PreTrainedModel:
    return kvquant_compile.optimize(tiny("llama"), bits=3, calibration=TEXT)


@pytest.fixture(scope="module")
def original() -> torch.Tensor:
    return logits(tiny("llama"))


@pytest.fixture(scope="module")
def llama() -> Untouched:
    return Untouched(tiny("llama"))
