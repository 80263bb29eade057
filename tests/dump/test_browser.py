"""The page in a real browser without a window: it renders, reacts, and its links work.

Needs the extra ``browser`` (playwright) and a Chromium: the system's, or one that playwright has
installed.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in SYSTEM if (path := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium starts here: {error.message.splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """The dump's page, in a browser that has no network; errors of any kind fail the test."""
    size = {"width": 1440, "height": 900}
    context = browser.new_context(viewport=size, offline=True, reduced_motion="reduce")
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith("file:") else wrong.append(r.url))
    opened.goto((folder / "index.html").as_uri())
    yield opened
    context.close()
    assert wrong == []


def colours(page: Any, selector: str) -> int:
    """How many colours a picture of a part of the page has."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    picture = image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert("RGB")
    return len(picture.getcolors(1 << 24))


def test_every_section_is_painted(page: Any) -> None:
    for name in ("passes", "graph", "layers", "tables", "certificate", "source"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["width"] > 1000
        assert box["height"] > 100
    assert colours(page, "#graph") > 60
    assert colours(page, "#tables .plot") > 20
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_navigation_leads_to_the_sections(page: Any) -> None:
    links = page.locator("nav a").all()
    for link in links:
        link.click()
        page.wait_for_timeout(50)
        target = page.locator(link.get_attribute("href"))
        least = 900 if link is links[-1] else 120  # the last one cannot reach the top
        assert 40 < target.bounding_box()["y"] < least


def test_a_box_shows_its_counterpart_and_leads_to_its_line(page: Any) -> None:
    page.locator("#graph-0 .node.role-append").first.hover()
    hot = page.locator("#graph-0 .node.hot")
    assert hot.count() == 2
    assert hot.locator(".title").all_text_contents() == ["append (marker)", "kvquant::append"]
    assert page.locator("#graph-0 .edge.hot").count() >= 6
    assert "past_key_values.update" in page.locator(".told").inner_text()
    page.locator("#graph-0 .node.role-append").first.click()
    line = page.locator(".listing .line:target")
    assert line.count() == 1
    assert line.is_visible()
    assert "kvquant_capture.append" in line.inner_text()


def test_a_colour_shows_one_part_everywhere(page: Any) -> None:
    chip = page.locator(".legend button.role-key-rotation")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "true"
    assert page.locator("#graph-0 .node.role-key-rotation.hot").count() == 14
    faded = page.locator("#graph-0 .node.plain").first
    page.wait_for_timeout(300)
    assert float(faded.evaluate("e => getComputedStyle(e).opacity")) < 0.5
    chip.click()
    assert page.locator("#graphs .hot").count() == 0


def test_tabs_show_one_layer_at_a_time(page: Any) -> None:
    assert page.locator("#plots-0").is_visible()
    page.locator("button[aria-controls='plots-1']").click()
    assert page.locator("#plots-1 svg").first.is_visible()
    assert not page.locator("#plots-0").is_visible()
    page.locator("button[aria-controls='graph-1']").click()
    assert "k4v2" in page.locator("#graph-1").inner_text()
    assert not page.locator("#graph-0").is_visible()


def test_light_and_dark(page: Any) -> None:
    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    light = paper()
    page.locator("#theme").click()
    dark = paper()
    assert light != dark
    page.locator("#theme").click()
    assert paper() == light
    page.emulate_media(color_scheme="dark")
    assert paper() == light  # what was chosen stays


def test_a_pass_opens_on_its_changes(page: Any) -> None:
    passes = page.locator(".passes li")
    assert passes.count() == 7
    rewritten = passes.nth(4)
    rewritten.locator("summary").click()
    assert rewritten.locator(".line.plus", has_text="kvquant.append.default").count() == 2
    assert rewritten.locator(".line.minus").first.is_visible()


def test_pictures_of_passes_open_by_themselves(browser: Any, folder: Path) -> None:
    opened = browser.new_page(viewport={"width": 1300, "height": 900})
    for path in (folder / "00-exported.svg", folder / "06-dead-code-eliminated.svg"):
        opened.goto(path.as_uri())
        assert colours(opened, "svg") > 60
    opened.close()
