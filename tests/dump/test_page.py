"""The page of a dump as text: whole, self-contained, and its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvquant_compile import logs
from kvquant_compile.dump.page import SECTIONS, STAGES
from kvquant_compile.dump.roles import MEANING
from tests.dump.html import Page

STAGE_FILES = ["00-exported", "01-captured", "02-absorbed", "03-recognised", "04-rewritten",
               "05-positions-from-slots", "06-dead-code-eliminated"]  # fmt: skip


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page.of((folder / "index.html").read_text(encoding="utf-8"))


def test_every_pass_has_a_numbered_text_and_picture(folder: Path) -> None:
    for kind in ("txt", "svg"):
        assert (
            sorted(p.stem for p in folder.glob(f"*.{kind}") if p.stem[0].isdigit()) == STAGE_FILES
        )
    for path in folder.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        Page.of(text)
        assert text.count('class="node') > 40
        assert "color-scheme: light dark" in text


def test_nothing_is_loaded_from_anywhere(folder: Path, page: Page) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert page.having("src") == []
    assert [e for e in page.elements if e.tag == "link"] == []
    assert "@import" not in text
    assert str(Path.home()) not in text
    assert "site-packages" not in text


def test_links_lead_to_places_on_the_page(page: Page) -> None:
    links = page.having("href") + page.having("xlink:href")
    links = [link for link in links if not link.startswith("data:")]
    assert len([x for x in links if x.startswith("#before-")]) > 30
    assert len([x for x in links if x.startswith("#after-")]) > 30
    assert {x for x in links if x.startswith("#") and x[1:] not in page.ids} == set()
    assert {f"#{name}" for name in SECTIONS} <= set(links)
    assert set(page.having("aria-controls")) <= set(page.ids)


def test_ids_are_unique(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert len(page.ids) > 200


def test_all_there_is_to_say_is_said(folder: Path, page: Page) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    wanted = [
        "LlamaForCausalLM (float32, cpu): 2 attention layers rewritten", "5.250", "6.10x",
        *STAGES, *STAGES.values(), *MEANING.values(),
        "backbone.layers.0", "backbone.layers.1", "append (marker)", "kvquant::append",
        "kvquant::attend", "k3v3 slots1/0", "k4v2 slots1/0", "calibrated tables", "packed pages",
        "Sensitivity by layer", "Outliers", "Levels over what they code, layer 1",
        "Range of every channel, layer 0", "expected loss, nats a token", "head 1",
        "R(a) R(b) = R(a + b)", "group law, largest residual", "keys stored", "before RoPE",
        "calibration", "source given", "def history_k3v3_", "def history_k4v2_",
    ]  # fmt: skip
    wanted += [line for layer in report["layers"] for line in layer["sites"].values()]
    wanted += list(report["validation"])
    assert [part for part in wanted if " ".join(str(part).split()) not in page.text] == []


def test_regions_are_coloured_on_both_sides(page: Page) -> None:
    nodes = [e.attributes for e in page.elements if "data-key" in e.attributes]
    kinds = {c for node in nodes for c in node["class"].split() if c.startswith("role-")}
    assert kinds == {f"role-{kind}" for kind in MEANING}
    append = [n for n in nodes if "role-append" in n["class"]]
    names = [set(n["data-names"].split()) for n in append]
    # Two blocks, before and after; a pair shares the marker's name.
    assert len(append) == 4
    assert names[0] & names[1]
    assert names[2] & names[3]
    assert not names[0] & names[2]


def test_texts_are_readable_and_in_step_with_the_page(folder: Path) -> None:
    first = (folder / "03-recognised.txt").read_text(encoding="utf-8")
    last = (folder / "06-dead-code-eliminated.txt").read_text(encoding="utf-8")
    assert "# ---- backbone.layers.0.self_attn" in first
    assert "  # modeling_llama.py:" in first
    assert "f32[B, 2, S, 16]" in first
    assert first.count("kvquant_capture.append") == first.count("kvquant_capture.attend") == 2
    assert "kvquant_capture" not in last
    assert last.count("= kvquant.append.default(") == last.count("= kvquant.attend.default(") == 2
    assert "kvquant_0_key_table: i8[2, 8] = constant" in last
    assert "kvquant_1_value_table: i8[2, 4] = constant" in last


def test_sources_and_reports_lie_beside_it(folder: Path) -> None:
    assert "LlamaForCausalLM" in (folder / "report.txt").read_text(encoding="utf-8")
    names = {p.name for p in folder.glob("layer-*")}
    assert {n.split("-")[1] for n in names} == {"0", "1"}


def test_the_docs_name_what_there_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "inspecting.md").read_text(encoding="utf-8")
    wanted = [*(f"`{stage}`" for stage in STAGES), "KVQUANT_DUMP", "KVQUANT_LOGS", "--dump",
              *(f".{part}`" for part in logs.PARTS)]  # fmt: skip
    assert [word for word in wanted if word not in text] == []
    for name in re.findall(r"\]\(([^)#]+)\)", text):
        assert (Path(__file__).parents[2] / "docs" / name).exists(), name
