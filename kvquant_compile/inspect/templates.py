"""The HTML templates of reports, in ``assets/report``."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2

FOLDER = files("kvquant_compile") / "assets" / "report"


def render(name: str, **values: Any) -> str:
    """A template filled in; whatever is no markup of our own is escaped.

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["error"] = _error
    return environment.get_template(name).render(**values)


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def asset(name: str) -> str:
    """A file of the folder as text."""
    return (FOLDER / name).read_text(encoding="utf-8")
