"""The generated text itself, for review."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.gluon.history import gluon_source
from kvquant_compile.lowering.gluon.spec import GluonSpec

GOLDEN = Path(__file__).with_name("golden_k3v3_d32.py.txt")
SMALL = GluonSpec(
    PageLayout(CodecSpec(3, 3, 1, 1, True, 1), 2, 32, 32, 2), True, 1, 1, *[False] * 4
)


def test_source_is_the_reviewed_text() -> None:
    if os.environ.get("KVQUANT_UPDATE_GOLDEN"):
        GOLDEN.write_text(gluon_source(SMALL))
    assert gluon_source(SMALL) == GOLDEN.read_text(), (
        "the generated kernel changed; look at the difference, then set KVQUANT_UPDATE_GOLDEN=1"
    )


def test_the_text_does_not_depend_on_heads() -> None:
    other = replace(SMALL, layout=replace(SMALL.layout, heads=5))
    assert other.name == SMALL.name
    assert _body(gluon_source(other)) == _body(gluon_source(SMALL))


@pytest.mark.parametrize(
    "change",
    [{"softcap": True}, {"window": True}, {"groups": 2}, {"dynamic": False}, {"terms": 8}],
)
def test_whatever_names_a_kernel_changes_its_text(change: dict[str, bool]) -> None:
    other = replace(SMALL, **change)
    assert _body(gluon_source(other)) != _body(gluon_source(SMALL))
    compile(gluon_source(other), other.name, "exec")


def _body(text: str) -> str:
    """All but the module's docstring and the kernel's name."""
    lines = text.splitlines()[1:]
    return "\n".join(line for line in lines if not line.startswith("def "))
