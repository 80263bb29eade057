"""Reports held to files: every word must be there, whatever the numbers are.

Numbers become ``#`` and what runs on this machine ``<runs>``; blanks are folded. After a change
that is meant, ``KVQUANT_GOLDEN=write`` writes the files anew, for a look at their difference.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = Path(__file__).with_name("golden")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_RUNS = re.compile(r"(?:reference op|generated kernel|decode step: ).*")
_RULES = re.compile("[─━┃│┏┓┗┛┡┩╇┼┴┬┌┐└┘├┤╞╡]+")


def normalised(text: str) -> list[str]:
    """Lines without blank ones."""
    lines = []
    for line in text.splitlines():
        line = _NUMBER.sub("#", _RUNS.sub("<runs>", _RULES.sub(" | ", line)))
        line = " ".join(line.split()).strip("| ")
        if line:
            lines.append(line)
    return lines


def check(name: str, text: str) -> None:
    """Compare a report with the file ``name`` of the folder, line by line."""
    path = FOLDER / f"{name}.txt"
    lines = normalised(text)
    if os.environ.get("KVQUANT_GOLDEN") == "write":
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert lines == path.read_text(encoding="utf-8").splitlines()
