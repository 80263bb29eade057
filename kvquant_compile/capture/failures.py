"""Why a model cannot be captured: what its own code did, and at which line."""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import nn
from transformers import PreTrainedModel

from kvquant_compile.capture.source_lines import SourceLine
from kvquant_compile.errors import KVQuantError, UnsupportedModelError

OTHER_MODEL = "Use a decoder-only language model with a key-value cache."


def definition_line(place: type) -> str:
    """``file.py:12`` of a class; its name where there is no source."""
    try:
        file, line = inspect.getsourcefile(place), inspect.getsourcelines(place)[1]
    except (OSError, TypeError):
        return place.__name__
    return f"{SourceLine.short(file or '')}:{line}"


def calling_line(module: nn.Module) -> str:
    """The innermost running line of a module's own methods; empty where none runs."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is module and _own(frame, module):
            return _text(frame, frame.f_lineno)
        frame = frame.f_back
    return ""


def failing_line(error: BaseException, model: nn.Module) -> str:
    """The innermost line of the model's own modules on an error's way; empty for none."""
    modules = {id(module): module for module in model.modules()}
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = modules.get(id(frame.f_locals.get("self")))
        if module is not None and _own(frame, module):
            found = _text(frame, line)
    return found


def _own(frame: FrameType, module: nn.Module) -> bool:
    return frame.f_globals.get("__name__") == type(module).__module__


def _text(frame: FrameType, line: int) -> str:
    file = frame.f_code.co_filename
    return str(SourceLine(SourceLine.short(file), line, linecache.getline(file, line).strip()))


def not_running(model: PreTrainedModel, error: Exception) -> UnsupportedModelError:
    """The refusal of a backbone that does not run behind a capture cache."""
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be captured",
        where=failing_line(error, model),
        why=f"its backbone does not run on embedded tokens and a cache: {_first_line(error)}",
        do=OTHER_MODEL,
    )


@contextmanager
def export_errors(model: PreTrainedModel) -> Iterator[None]:
    """Errors of the exporter become refusals inside the block.

    Raises:
        UnsupportedModelError: the model's code failed, or cannot be traced.
    """
    try:
        yield
    except KVQuantError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be captured",
            where=failing_line(error, model),
            why=f"torch.export failed: {_first_line(error)}",
            do="Models whose Python control flow depends on tensor data are not supported.",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
