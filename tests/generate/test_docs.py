"""The table in ``docs/generate.md``: every row names a test, and that test exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8").splitlines()
HEADS = "| ---", "| feature"
ROWS = [line for line in LINES if line.startswith("| ") and not line.startswith(HEADS)]
TEST = re.compile(r"^`([\w/]+\.py)(?:::(\w+)(?:\[(.+)\])?)?`$")


def test_there_are_rows() -> None:
    assert len(ROWS) > 60
    assert len(set(ROWS)) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_row_names_a_test(row: str) -> None:
    feature, outcome, test = (cell.strip() for cell in row.strip("|").split("|"))
    assert feature
    assert outcome
    found = TEST.match(test)
    assert found, f"no test in {test}"
    path, name, case = found.groups()
    assert (ROOT / "tests" / path).is_file()
    if name is None:
        return
    module = importlib.import_module("tests." + path.removesuffix(".py").replace("/", "."))
    function = getattr(module, name)
    if case is not None:
        marks = [m for m in function.pytestmark if m.name == "parametrize"]
        assert any(case in map(str, mark.args[1]) for mark in marks), f"no case {case}"
