"""Where in the model's source a node comes from, read off the trace that torch.export keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+)')


@dataclass(frozen=True)
class SourceLine:
    """A line of Python.

    Attributes:
        file: the file's name without its folder.
        line: its number, from 1.
        text: what stands there.
    """

    file: str
    line: int
    text: str

    @staticmethod
    def short(file: str) -> str:
        """A path's file name."""
        return file.replace("\\", "/").rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def source_line(node: fx.Node) -> SourceLine | None:
    """The innermost line of a node's stack trace; None where the node has none."""
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    frames = [(i, found) for i, line in enumerate(lines) if (found := _FRAME.match(line))]
    if not frames:
        return None
    at, frame = frames[-1]
    file = SourceLine.short(frame["file"])
    return SourceLine(file, int(frame["line"]), " ".join(lines[at + 1 :]))
