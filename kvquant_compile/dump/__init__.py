"""Dumps: the graph after every pass, plots of the tables, certificates and sources, as files."""

from __future__ import annotations

import os
from pathlib import Path

from kvquant_compile.observer import SILENT, Observer

VARIABLE = "KVQUANT_DUMP"


def dumping(folder: str | Path | None, name: str) -> Observer:
    """An observer that writes a dump into ``folder``.

    Args:
        folder: created if need be; files of an earlier dump are overwritten. None: a new folder
            ``name-0``, ``name-1``, ... inside the one that :data:`VARIABLE` in the environment
            names, or no dump at all if it names none.
        name: of the model.

    Raises:
        OptionError: the folder cannot be made.
    """
    outer = os.environ.get(VARIABLE, "")
    if folder is None and not outer:
        return SILENT
    from kvquant_compile.dump.record import Dump

    return Dump(Path(folder) if folder is not None else _unused(Path(outer), name), name)


def _unused(outer: Path, name: str) -> Path:
    number = 0
    while (outer / f"{name}-{number}").exists():
        number += 1
    return outer / f"{name}-{number}"
