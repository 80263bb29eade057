"""Backbones that are fed token ids beside embedded tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kvquant_compile
from kvquant_compile.capture import capture
from kvquant_compile.capture.embedding import extra_inputs
from kvquant_compile.errors import OptionError
from tests import zoo
from tests.survey.case import _generate
from tests.survey.own import OWN
from tests.survey.shrink import shrunk


@pytest.fixture(scope="module")
def model():
    """Tokens are embedded in groups, by their ids."""
    if "qwen4_exp_text" not in CONFIG_MAPPING:
        pytest.skip("these transformers have no such type")
    kind = CONFIG_MAPPING["qwen4_exp_text"]
    own = {"ple_layer_ids": [1], "heads_per_ngram": 2, "ngram_size": 3, "eos_token_id": 2}
    torch.manual_seed(0)
    config = kind(**{**shrunk(kind()), **OWN["qwen4_exp_text"], **own})
    return zoo.randomise(AutoModelForCausalLM.from_config(config)).eval()


def test_token_ids_are_an_input_of_the_graph(model):
    captured = capture(model)
    assert extra_inputs(captured.backbone) == ("ple_input_ids",)
    assert captured.placeholder("ple_input_ids") in captured.data_inputs


def test_generation_embeds_groups_across_steps(model):
    expected = _generate(model)
    kvquant_compile.optimize(model, bits=16, progress=False)
    assert torch.equal(_generate(model), expected)
    with torch.no_grad():
        hidden = model.get_input_embeddings()(torch.tensor([[5, 6]]))
        with pytest.raises(OptionError, match="inputs_embeds without ple_input_ids"):
            model(inputs_embeds=hidden)
    kvquant_compile.restore(model)
