"""The optional packages that ONNX files are made and run with."""

from __future__ import annotations

import importlib
from types import ModuleType

from kvquant_compile.errors import MissingDependencyError


def need(*names: str) -> list[ModuleType]:
    """Optional modules by name.

    Raises:
        MissingDependencyError: one is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX files cannot be made or run here",
            why=str(error),
            do='Install the optional packages: pip install "kvquant-compile[onnx]".',
        ) from error
