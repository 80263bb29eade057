"""Logging: quiet by default, by part on request; what is logged is what happened."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator

import pytest

import kvquant_compile
from kvquant_compile import logs
from tests.zoo import tiny, tokens

TEXT = tokens(4, 64, seed=7)


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Levels and handlers are as before after every test."""
    package = logging.getLogger(logs.PACKAGE)
    handlers, levels = package.handlers[:], {p: logs.logger(p).level for p in logs.PARTS}
    yield
    package.handlers[:] = handlers
    for part, level in levels.items():
        logs.logger(part).setLevel(level)


def test_every_part_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logs.PACKAGE):
        model = kvquant_compile.optimize(tiny("llama"), {0: 3, 1: (4, 2)}, calibration=TEXT)
        kvquant_compile.restore(model)
    said: dict[str, str] = {}
    for record in caplog.records:
        if record.name.startswith(logs.PACKAGE):
            part = record.name.split(".")[1]
            said[part] = said.get(part, "") + f"{record.levelname} {record.getMessage()}\n"
    assert set(said) == set(logs.PARTS)
    wanted = {
        "capture": ["INFO LlamaForCausalLM: ", " nodes, transformers, in "],
        "passes": ["INFO matched LayerPlan(0: 4 query heads, 2 kv heads x 16/16, "
                   "RopeSpec(half, 16/16 channels))",
                   "INFO matched LayerPlan(1:", "DEBUG layer 1: certificate",
                   "INFO rewritten: 2 layers"],
        "calib": ["INFO observed 1024 tokens in 16 windows, given and sampled by the model",
                  "DEBUG layer 1: LayerTables(2 heads x 16/16, 16/4 levels"],
        "lowering": ["DEBUG layer 0: k3v3 slots1/0", "DEBUG layer 1: k4v2 slots1/0"],
        "runtime": ["DEBUG lossless rewrite, through pages, 70 tokens after 8: relative error",
                    "INFO LlamaForCausalLM runs Program(2 layers k3v3/k4v2",
                    "INFO LlamaForCausalLM runs as it was"],
    }  # fmt: skip
    assert [(p, x) for p, parts in wanted.items() for x in parts if x not in said[p]] == []


def test_quiet_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("")
    package = logging.getLogger(logs.PACKAGE)
    assert {type(h) for h in package.handlers} == {logging.NullHandler}
    logs.logger("passes").warning("seen?")
    assert capsys.readouterr() == ("", "")


def test_loud_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "passes,+capture")
    importlib.reload(kvquant_compile)  # the variable is read on import
    for part in logs.PARTS:
        logs.logger(part).info("%s did", part)
        logs.logger(part).debug("%s how", part)
    out, err = capsys.readouterr()
    assert out == ""
    shown = [line.split("kvquant_compile.")[1] for line in err.splitlines()]
    assert shown == ["capture: capture did", "capture: capture how", "passes: passes did"]


@pytest.mark.parametrize(
    ("asked", "levels"),
    [
        ("", {}),
        ("passes", {"passes": logging.INFO}),
        ("+capture, -calib", {"capture": logging.DEBUG, "calib": logging.ERROR}),
        ("all,+runtime", {**dict.fromkeys(logs.PARTS, logging.INFO), "runtime": logging.DEBUG}),
    ],
)
def test_the_variable_is_spelled_as_torch_s(asked: str, levels: dict[str, int]) -> None:
    for part in logs.PARTS:
        logs.logger(part).setLevel(logging.NOTSET)
    logs.configure(asked)
    found = {part: logs.logger(part).level for part in logs.PARTS}
    assert {part: level for part, level in found.items() if level} == levels


def test_a_wrong_name_warns_and_stops_nothing() -> None:
    with pytest.warns(UserWarning, match="'pases' is none of all, capture, passes"):
        logs.configure("pases,+calib")
    assert logs.logger("calib").level == logging.DEBUG
