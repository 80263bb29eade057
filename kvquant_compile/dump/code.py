"""Source with its syntax marked up."""

from __future__ import annotations

import re

from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from kvquant_compile.lowering.source import language

# Blanks, punctuation and plain names: most of the spans, and all of the ink's colour.
_UNCOLOURED = re.compile(r'<span class="(?:w|p|n|o)">([^<]*)</span>')


def highlighted(source: str) -> Markup:
    """Spans of Pygments' short classes."""
    lexer = get_lexer_by_name(language(source))
    marked = highlight(source, lexer, HtmlFormatter(nowrap=True))
    return Markup(_UNCOLOURED.sub(r"\1", marked))


def style() -> str:
    """Colours of the classes, for light and dark."""
    light, dark = (_colours(name) for name in ("tango", "github-dark"))
    both = {name: f"light-dark({light.get(name, 'inherit')}, {dark.get(name, 'inherit')})"
            for name in light.keys() | dark.keys()}  # fmt: skip
    ink = "var(--ink)"
    return "\n".join(
        f".code .{name} {{ color: {value.replace('inherit', ink)}; }}"
        for name, value in sorted(both.items())
    )


def _colours(name: str) -> dict[str, str]:
    """Class -> colour of one of Pygments' styles."""
    found = {}
    for short, (_, kind, _) in HtmlFormatter(style=name).class2style.items():
        colour = HtmlFormatter(style=name).style.style_for_token(kind)["color"]
        if short and colour:
            found[short] = f"#{colour}"
    return found
