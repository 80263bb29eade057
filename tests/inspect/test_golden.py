"""Every public report, word for word: nothing disappears unnoticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import kvquant_compile
from kvquant_compile.evaluate import sections
from kvquant_compile.evaluate.score import Score
from kvquant_compile.evaluate.table import Row, render
from tests.dump.html import Page
from tests.inspect import golden
from tests.zoo import decoder, tokens

TEXT = tokens(4, 64, seed=7)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A hand-written decoder, whose source is part of the tests, and its dump."""
    folder = tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVQUANT_KERNELS", "torch")  # the same on every machine
        model = kvquant_compile.optimize(
            decoder("MatmulDecoder"), "auto", budget=4.5, allocation="fisher", calibration=TEXT,
            example_inputs=(tokens(), None), dump=folder,
        )  # fmt: skip
    return model, folder


def outline(value: Any, indent: str = "") -> list[str]:
    """Keys of a JSON value, one a line; of a list, those of its first element."""
    if isinstance(value, list):
        return outline(value[0], indent) if value else []
    if not isinstance(value, dict):
        return []
    return [x for k, v in value.items() for x in (f"{indent}{k}", *outline(v, indent + "  "))]


def test_explain_on_a_terminal(dumped: tuple[Any, Path]) -> None:
    golden.check("explain", str(kvquant_compile.explain(dumped[0])))


def test_explain_in_a_notebook(dumped: tuple[Any, Path]) -> None:
    page = Page.of(kvquant_compile.explain(dumped[0])._repr_html_())
    golden.check("notebook", "\n".join(page.words))


def test_explain_as_a_record(dumped: tuple[Any, Path]) -> None:
    record = json.loads(json.dumps(kvquant_compile.explain(dumped[0], source=True).to_dict()))
    for kept in ("losses", "widths"):
        assert len(record["calibration"]["mixed"].pop(kept)) == 4
    for source in record["sources"]:
        assert source.pop("kernels") or source["reason"]
    golden.check("record", "\n".join(outline(record)))


def test_the_page(dumped: tuple[Any, Path]) -> None:
    text = (dumped[1] / "index.html").read_text(encoding="utf-8")
    page = Page.of(text[: text.index('id="source"')] + "></section></main></body></html>")
    golden.check("page", "\n".join(page.prose))


@pytest.mark.parametrize("name", ["03-recognised", "06-dead-code-eliminated"])
def test_graphs_as_text(dumped: tuple[Any, Path], name: str) -> None:
    path = next(p for p in dumped[1].glob("*.txt") if p.stem.endswith(name.split("-", 1)[1]))
    lines = path.read_text(encoding="utf-8").splitlines()
    # The model's own operations are spelled as torch spells them at the time.
    golden.check(f"graph-{name}", "\n".join(x for x in lines if "kvquant" in x or "# " in x))


ROWS = [
    Row("original", 16, 32.0, 4096, Score(9.0, 0.0, 1.0, 2, 254, 0.0, 0.0), 0.0),
    Row("kvquant+ 3", 3, 3.4, 435, Score(9.1, 0.01, 0.98, 2, 254, 0.001, 0.002), 1.1),
    Row("fp8", 8, 8.0, None, Score(9.01, 0.001, 0.99, 2, 254, None, None), 0.1),
]
NEEDLES = {row.name: {"depths": [{"depth": d, "accuracy": 1.0, "loss": 0.5} for d in (0.0, 0.5)]}
           for row in ROWS}  # fmt: skip
AGREEMENT = {"kvquant+ 3": {"runs": [{"same": 5, "share": 0.9}, {"same": 8, "share": 1.0}]}}
TABLES: dict[str, Callable[[], Any]] = {
    "scores": lambda: render(ROWS, "model: text, 2 windows of 128", ["fp8"]),
    "grid": lambda: sections.grid_table({(k, v): ROWS[1] for k in (2, 3) for v in (2, 3)}, "kivi"),
    "needle": lambda: sections.needle_table(NEEDLES, 128),
    "agreement": lambda: sections.agreement_table(AGREEMENT, 8),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_the_laboratory_s_tables(name: str) -> None:
    console = Console(width=150, record=False)
    with console.capture() as capture:
        console.print(TABLES[name]())
    golden.check(f"lab-{name}", capture.get())


def test_a_word_that_disappears_is_noticed(
    dumped: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVQUANT_GOLDEN", raising=False)
    text = str(kvquant_compile.explain(dumped[0]))
    for word in ("symbolic", "effective bits", "calibration", "append", "before RoPE"):
        assert word in text
        with pytest.raises(AssertionError):
            golden.check("explain", text.replace(word, "", 1))
