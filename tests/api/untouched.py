"""An attempt at a model that must raise, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile import (
    KVQuantError,
)
from tests.zoo import tokens


def generated(model: Any) -> torch.Tensor:
    return model.generate(tokens(1, 9), max_new_tokens=5, do_sample=False, pad_token_id=0)


def attributes(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Every module's own attributes, its parameters and submodules by identity."""
    return [
        (module, {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]


def same_attributes(before: list, after: list) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        return a is b or (not isinstance(a, (torch.Tensor, nn.Module)) and a == b)

    return len(before) == len(after) and all(
        m is n and same(a, b) for (m, a), (n, b) in zip(before, after, strict=True)
    )


class Untouched:
    """Asserts that an attempt raises, and that the model is as it was."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.text = generated(model)

    def refuses(self, kind: type[KVQuantError], match: str, **options: Any) -> None:
        model = self.model
        before, config = attributes(model), model.config.to_dict()
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        implementation = model.config._attn_implementation
        with pytest.raises(kind, match=match) as caught:
            kvquant_compile.optimize(model, **options)
        error = caught.value
        assert error.what
        assert error.why
        assert error.do
        assert same_attributes(before, attributes(model))
        assert model.config.to_dict() == config
        assert model.config._attn_implementation == implementation
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name])
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert torch.equal(generated(model), self.text)
