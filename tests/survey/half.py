"""Whether a model loaded in half precision is recognised as it is in single precision."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

import kvquant_compile
from kvquant_compile.errors import KVQuantError
from kvquant_compile.plan import RopeSpec
from kvquant_compile.runtime.installed import installed
from tests.survey.case import build

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SAME = "as float32"
# What two plans of one layer must have in common; frequencies, to the bit.
_COMPARED = ("index", "kv_heads", "key_dim", "value_dim", "rope", "attends", "latent")


def compare_half(model_type: str, names: Sequence[str] = tuple(DTYPES)) -> dict[str, str]:
    """Differences to the plans of single precision by dtype; ``as float32`` where there are none.

    The tiny model is saved and loaded in the dtype, as its users would, and optimised with
    lossless pages, which validates it.
    """
    model = build(model_type)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reference = _plans(model)
        return {
            name: _difference(
                reference, _plans(type(model).from_pretrained(folder, dtype=DTYPES[name]))
            )
            for name in names
        }


def _plans(model: PreTrainedModel) -> list[Any] | str:
    try:
        kvquant_compile.optimize(model.eval(), bits=16, strict=False, progress=False)
    except KVQuantError as error:
        return f"refused: {error}"
    return [layer.plan for layer in installed(model).layers]


def _difference(expected: list[Any] | str, got: list[Any] | str) -> str:
    if isinstance(expected, str) or isinstance(got, str):
        same = isinstance(expected, str) and isinstance(got, str)
        return SAME if same else f"{_one_line(got)} (float32: {_one_line(expected)})"
    for a, b in zip(expected, got, strict=True):
        for name in _COMPARED:
            if getattr(a, name) != getattr(b, name):
                found = b.refusal or f"{name} {getattr(b, name)} instead of {getattr(a, name)}"
                return f"layer {a.index}: {_frequencies(a.rope, b.rope) or found}"
    return SAME


def _frequencies(expected: RopeSpec | None, got: RopeSpec | None) -> str:
    """How far they are apart, where two rotations differ in nothing else; else empty."""
    if (
        expected is None
        or got is None
        or replace(got, frequencies=expected.frequencies) != expected
    ):
        return ""
    apart = max(abs(a - b) for a, b in zip(expected.frequencies, got.frequencies, strict=True))
    return f"frequencies within {apart:.0e}" if apart else ""


def _one_line(plans: list[Any] | str) -> str:
    return " ".join(plans.split()) if isinstance(plans, str) else "rewritten"
