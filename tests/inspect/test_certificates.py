"""Certificates as files, and the check that needs nothing but the file."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest

import kvquant_compile
from kvquant_compile.inspect.certificates import save, verify
from tests import zoo


@functools.cache
def found() -> dict[int, dict[str, Any]]:
    model = zoo.tiny("gpt_neox", num_hidden_layers=2)
    return kvquant_compile.certificates(kvquant_compile.optimize(model, bits=16))


def test_every_layer_has_one_that_says_what_was_proved() -> None:
    first = found()[0]
    assert list(found()) == [0, 1]
    assert first["keys"] == "before RoPE"
    assert first["rope"]["in_pairs"] == [[0, 2], [1, 3]]
    assert len(first["rope"]["passthrough"]) == 12
    assert first["evidence"]["method"] == "symbolic"
    assert "modeling_gpt_neox.py" in first["evidence"]["source"]
    assert set(first["versions"]) == {"kvquant_compile", "torch", "transformers"}
    assert max(first["validation"].values()) < 1e-4


def test_files_are_read_back_and_verified(tmp_path: Path) -> None:
    files = save(found(), tmp_path / "proofs")
    assert [file.name for file in files] == ["layer-000.json", "layer-001.json"]
    for file in files:
        assert verify(json.loads(file.read_text())) < 1e-6


def test_another_rotation_than_the_models_fails_the_check() -> None:
    record = copy.deepcopy(found()[0])
    record["rope"]["frequencies"][0] *= 1.01
    assert verify(record) > 1e-3
    record["rope"]["in_pairs"][1] = [0, 1]
    with pytest.raises(kvquant_compile.OptionError, match="used twice"):
        verify(record)
    with pytest.raises(kvquant_compile.OptionError, match="schema"):
        verify({**record, "schema": 0})


def test_keys_behind_their_rotation_say_why() -> None:
    model = zoo.unproved(num_hidden_layers=1)
    with pytest.warns(UserWarning, match="RoPE"):
        kvquant_compile.optimize(model, bits=16, strict=False)
    (record,) = kvquant_compile.certificates(model).values()
    assert record["keys"] == "behind RoPE"
    assert record["rope"] is None
    assert "no proved rotary embedding" in record["refusal"]
