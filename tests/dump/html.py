"""A strict reader of the pages that dumps write."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "hr", "img", "input", "link"}


@dataclass(frozen=True)
class Element:
    """A start tag."""

    tag: str
    attributes: dict[str, str]


@dataclass
class Page(HTMLParser):
    """Elements and text of a page; unbalanced tags are errors.

    Attributes:
        elements: in order.
        words: all text outside scripts and styles.
        prose: the same outside listings and drawings.
        ids: of elements, in order.
    """

    elements: list[Element] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @staticmethod
    def of(text: str) -> Page:
        """Read a page."""
        page = Page()
        page.feed(text)
        page.close()
        assert page.open == [], f"never closed: {page.open}"
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.elements.append(Element(tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.elements.append(Element(tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)
            self.prose += [] if {"pre", "svg"} & set(self.open) else [data]

    @property
    def text(self) -> str:
        """All of it, blanks folded."""
        return " ".join(" ".join(self.words).split())

    @property
    def ids(self) -> list[str]:
        """In order."""
        return [e.attributes["id"] for e in self.elements if "id" in e.attributes]

    def having(self, name: str) -> list[str]:
        """Values of an attribute."""
        return [e.attributes[name] for e in self.elements if name in e.attributes]
