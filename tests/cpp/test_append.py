"""The compiled append gives the very bytes that torch does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvquant_compile.lowering.append import append as torch_append
from kvquant_compile.lowering.cpp.append import append
from kvquant_compile.lowering.cpp.build import toolchain_failure
from tests.lowering.test_remembered import layers_that_share_keys
from tests.triton import append_cases
from tests.triton.append_cases import APPENDS, check_append

pytestmark = pytest.mark.skipif(bool(toolchain_failure()), reason=toolchain_failure() or "never")


@pytest.mark.parametrize("name", APPENDS)
def test_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_cases.kernels, "append", append)
    assert check_append(name, APPENDS[name], torch.device("cpu"))


def test_without_this_machines_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_cases.kernels, "append", lambda *given: append(*given, native=False))
    assert check_append("portable", APPENDS["k3v3 default"], torch.device("cpu"))


@pytest.mark.parametrize("name", ["k3v3 default", "k3v2 recent"])
def test_many_tokens_and_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_cases.kernels, "append", append)
    steps = ((1, 0), *(((16, 0),) * 8))
    case = replace(APPENDS[name], steps=steps, strange=0.03, heads=2, feedback=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert check_append("threads", case, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)


def test_layers_that_share_keys_code_values_by_tables_of_their_own() -> None:
    layers = layers_that_share_keys()
    for layer in layers:
        cache = layer.cache
        stores = [[slab.clone() for slab in cache.pages] for _ in range(2)]
        for run, pages in zip((append, torch_append), stores, strict=True):
            run(layer.key, layer.value, layer.slots, cache.table, pages, cache.sinks, cache.tables,
                cache.geometry, str(layer.layout))  # fmt: skip
        assert all(map(torch.equal, *stores))
