"""What an optimised model gives, and its tables."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

import kvquant_compile
from tests.zoo import tokens

TEXT = tokens(4, 64, seed=7)
IDS = tokens(2, 70, seed=3)


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=True).logits


def quantised(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with kvquant_compile.quantised_attention(model):
        return logits(model, ids)


def tables(model: PreTrainedModel) -> dict[tuple[int, str], torch.Tensor]:
    return {
        (index, name): tensor
        for index, layer in kvquant_compile.artifact(model).tables.items()
        for name, tensor in layer.tensors().items()
    }


def same_tables(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    first, second = tables(a), tables(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
