"""Markers, the path of development models and texts, and one thread per process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Tiny models: more threads only wait for each other.
torch.set_num_threads(int(os.environ.get("KVQUANT_TEST_THREADS", "1")))
SHARED = Path(os.environ.get("KVQUANT_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")


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


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of development models and texts."""
    return SHARED
