"""Tiny models under every recipe, shared by the tests of this folder."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import kvquant_compile
from kvquant_compile.recipes import kivi, rvq
from tests.zoo import tiny, tokens

TEXT = list(tokens(4, 96, seed=7).split(1))
IDS = tokens(2, 150, seed=3)
small_rvq = functools.partial(rvq, entries=16, steps=2)
RECIPES: dict[str, tuple[Any, Any]] = {
    "kvquant+": ("kvquant+", 2),
    "kvquant": ("kvquant", 2),
    "int": ("int", 3),
    "fp8": ("fp8", None),
    "kivi": (functools.partial(kivi, window=32), 2),
    "rotatekv": ("rotatekv", 2),
    "qserve": ("qserve", 4),
    "gear": ("gear", 2),
    "rvq": (small_rvq, 2),
}


@functools.cache
def optimised(name: str) -> Any:
    recipe, bits = RECIPES[name]
    given = {"calibration": TEXT, "own_text": 0}
    return kvquant_compile.optimize(tiny("llama"), bits, recipe=recipe, **given)


@functools.cache
def original() -> Tensor:
    with torch.no_grad():
        return tiny("llama")(IDS).logits


def quantised(model: Any, ids: Tensor = IDS) -> tuple[Tensor, Any]:
    cache = kvquant_compile.new_cache(model)
    with torch.no_grad(), kvquant_compile.quantised_attention(model):
        return model(ids, past_key_values=cache).logits, cache


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
