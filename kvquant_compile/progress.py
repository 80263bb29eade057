"""Progress bars on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress

Item = TypeVar("Item")


class Progress:
    """Named stages with a bar each, written to stderr.

    Args:
        shown: force bars on or off; None shows them when stderr is a terminal.
    """

    def __init__(self, shown: bool | None = None) -> None:
        visible = sys.stderr.isatty() if shown is None else shown
        self._bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not visible,
            transient=True,
        )
        self._open: int | None = None

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int = 1) -> None:
        """Finish the open stage and begin another."""
        if self._open is not None:
            done = self._bars.tasks[self._open].total
            self._bars.update(self._bars.task_ids[self._open], completed=done or 0)
        self._bars.add_task(name, total=total)
        self._open = len(self._bars.tasks) - 1

    def each(self, name: str, items: Sequence[Item] | Iterable[Item], total: int) -> Iterator[Item]:
        """Iterate over a stage of ``total`` items."""
        self.stage(name, total)
        task = self._bars.task_ids[-1]
        for item in items:
            yield item
            self._bars.advance(task)
