"""Everything that depends on how, and whether, Triton is installed."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any


@functools.cache
def unavailable() -> str:
    """Why kernels cannot run here; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def native() -> bool:
    """Whether kernels may use NVIDIA's packed instructions through inline assembly."""
    import torch

    return not interpreting() and torch.version.hip is None


def launch_options(**options: Any) -> dict[str, Any]:
    """Compiler options of a launch; the interpreter takes none."""
    return {} if interpreting() else options
