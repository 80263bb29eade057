"""``kvquant-compile memory``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvquant_compile
from kvquant_compile.cli import app

DEMO = Path(kvquant_compile.__file__).parent / "assets" / "demo"


@pytest.mark.slow
def test_memory_of_the_demo_model() -> None:
    command = ["memory", "--model", str(DEMO), "--context", "3000", "--batch", "2", "--json"]
    result = CliRunner().invoke(app, [*command, "--memory", "150 MB", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.output[result.output.index("{") :])
    assert record["context"] == 3000
    assert record["parts"]["workspace"]["bytes"] > 0
    assert 3000 < record["max_context"] < 10**6


def test_the_table_names_every_part() -> None:
    result = CliRunner().invoke(app, ["memory", "--model", str(DEMO), "--context", "300"])
    assert result.exit_code == 0, result.output
    for word in ("weights", "tables", "cache", "workspace", "total", "ceiling(T/64)"):
        assert word in result.output
