"""The observer that collects a dump and writes it."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from kvquant_compile.dump.snapshot import GraphView, snapshot
from kvquant_compile.dump.text import graph_text
from kvquant_compile.errors import OptionError
from kvquant_compile.observer import Observer
from kvquant_compile.runtime.installed import Installed


class Dump(Observer):
    """Writes what it is told to a folder.

    Args:
        folder: made at once, so that a bad path is refused before any work.

    Raises:
        OptionError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.graphs: list[GraphView] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"dump={str(folder)!r}", why=str(error), do="Name a folder that can be written to."
            ) from error

    def graph(self, stage: str, gm: fx.GraphModule) -> None:
        """Keep a graph as it is now, and write it as text."""
        number = len(self.graphs)
        self.graphs.append(snapshot(stage, gm))
        text = graph_text(self.graphs[-1], number)
        self._write(f"{number:02d}-{stage.replace(' ', '-')}.txt", text)

    def finished(self, state: Installed) -> None:
        """Write everything else."""

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")
