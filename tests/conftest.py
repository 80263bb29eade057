"""Markers, the path of development models and texts, and one thread per process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvquant_compile.lowering.cpp import dispatch

# Tiny models: more threads only wait for each other.
torch.set_num_threads(int(os.environ.get("KVQUANT_TEST_THREADS", "1")))
SHARED = Path(os.environ.get("KVQUANT_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")
    parser.addoption(
        "--cpp",
        action="store_true",
        help="decode steps of every test run compiled C++, not only those of tests/cpp",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {
        "slow": (not config.getoption("--slow"), "slow; pass --slow"),
        "gpu": (not torch.cuda.is_available(), "needs a CUDA device"),
        "shared": (
            not (SHARED / "models").is_dir(),
            "needs the development models and texts; set KVQUANT_SHARED to their folder",
        ),
    }
    for item in items:
        for name, (skip, reason) in skips.items():
            if skip and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _torch_on_cpus(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models come in a hundred formats; compiling a kernel for each would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--cpp"):
            patch.setattr(dispatch, "DECODE_STEPS", 0)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of development models and texts."""
    return SHARED
