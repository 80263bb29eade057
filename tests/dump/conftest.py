"""One dump of a tiny model, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvquant_compile
from tests.zoo import tiny, tokens

TEXT = tokens(4, 64, seed=7)


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of a Llama with two layers of different widths."""
    path = tmp_path_factory.mktemp("dump") / "llama"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVQUANT_KERNELS", "torch")  # the same sources on every machine
        kvquant_compile.optimize(tiny("llama"), {0: 3, 1: (4, 2)}, calibration=TEXT, dump=path)
    return path
