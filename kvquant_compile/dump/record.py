"""The observer that collects a dump and writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import fx

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.observe import Observed
from kvquant_compile.capture.captured import Captured
from kvquant_compile.dump.page import Content, page
from kvquant_compile.dump.pictures import whole_graph
from kvquant_compile.dump.roles import Role, captured_roles, rewritten_roles
from kvquant_compile.dump.snapshot import GraphView, snapshot
from kvquant_compile.dump.statistics import PartStatistics, layer_statistics
from kvquant_compile.dump.text import graph_text
from kvquant_compile.errors import KVQuantError, OptionError
from kvquant_compile.inspect.explained import explained
from kvquant_compile.lowering.source import language
from kvquant_compile.observer import Observer
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.runtime.installed import Installed


class Dump(Observer):
    """Writes what it is told to a folder: texts as they come, pictures and the page at the end.

    Args:
        folder: made at once, so that a bad path is refused before any work.
        model: class name.

    Raises:
        OptionError: it cannot be made.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.graphs: list[GraphView] = []
        self.roles: dict[str, Role] = {}
        self.statistics: list[PartStatistics] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"dump={str(folder)!r}", why=str(error), do="Name a folder that can be written to."
            ) from error

    def graph(self, stage: str, gm: fx.GraphModule) -> None:
        """Keep a graph as it is now, and write it as text."""
        self.graphs.append(snapshot(stage, gm))
        number = len(self.graphs) - 1
        self._write(f"{self._stem(number)}.txt", graph_text(self.graphs[-1], number))

    def matched(self, captured: Captured, layers: Sequence[MatchedLayer]) -> None:
        """Keep what became of which node."""
        self.roles = captured_roles(captured, layers)

    def calibrated(
        self,
        layers: Sequence[MatchedLayer],
        observed: Mapping[int, Observed],
        artifact: Artifact,
    ) -> None:
        """Sum up what was observed."""
        self.statistics = layer_statistics(layers, observed, artifact)

    def finished(self, state: Installed) -> None:
        """Write pictures, report, sources and page."""
        report = explained(state, source=True)
        after = rewritten_roles(self.graphs[-1], self.roles)
        self._pictures()
        record = replace(report, sources=()).to_dict()
        self._write("report.json", json.dumps(record, indent=2) + "\n")
        self._write("report.txt", str(replace(report, sources=())))
        for source in report.sources:
            for name, text in source.kernels.items():
                ending = "cpp" if language(text) == "cpp" else "py"
                self._write(f"layer-{source.index}-{name}.{ending}", text)
        content = Content(self.model, self.graphs, self.roles, after, report, self.statistics)
        self._write("index.html", page(content))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Where something is refused, the page says so and shows how far it came."""
        try:
            yield
        except KVQuantError as error:
            self._pictures()
            self._write("index.html", page(Content(self.model, self.graphs, error=str(error))))
            raise

    def _pictures(self) -> None:
        for number, graph in enumerate(self.graphs):
            roles = rewritten_roles(graph, self.roles)
            self._write(f"{self._stem(number)}.svg", whole_graph(graph, roles))

    def _stem(self, number: int) -> str:
        return f"{number:02d}-{self.graphs[number].stage.replace(' ', '-')}"

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")
