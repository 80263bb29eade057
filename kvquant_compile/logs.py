"""Logging: plain loggers named ``kvquant_compile.<part>``, and a variable that shows them.

Nothing is shown unless it is asked for, by ``logging`` as usual or by
``KVQUANT_LOGS=passes,+capture,-calib``, in the spelling of ``TORCH_LOGS``: a part's name shows what
it did (INFO), ``+`` shows how as well (DEBUG), ``-`` shows errors only; ``all`` stands for every
part.
"""

from __future__ import annotations

import logging
import sys
import warnings

PACKAGE = "kvquant_compile"
VARIABLE = "KVQUANT_LOGS"
PARTS = ("capture", "passes", "calib", "lowering", "runtime")
_LEVELS = {"": logging.INFO, "+": logging.DEBUG, "-": logging.ERROR}
_FORMAT = "%(levelname).1s %(asctime)s %(name)s: %(message)s"


def logger(part: str) -> logging.Logger:
    """The logger of one of :data:`PARTS`."""
    assert part in PARTS, part
    return logging.getLogger(f"{PACKAGE}.{part}")


def configure(asked: str) -> None:
    """Show what :data:`VARIABLE` asks for on stderr; the package is quiet otherwise.

    A name that is no part warns: a wrong variable must not stop a program.
    """
    package = logging.getLogger(PACKAGE)
    package.addHandler(logging.NullHandler())
    levels: dict[str, int] = {}
    for word in filter(None, (word.strip() for word in asked.split(","))):
        sign = word[0] if word[0] in "+-" else ""
        name = word[len(sign) :]
        if name != "all" and name not in PARTS:
            warnings.warn(
                f"{VARIABLE}={asked}: {name!r} is none of all, {', '.join(PARTS)}", stacklevel=3
            )
            continue
        levels |= dict.fromkeys(PARTS if name == "all" else (name,), _LEVELS[sign])
    for part, level in levels.items():
        logger(part).setLevel(level)
    if levels and not any(isinstance(h, _Shown) for h in package.handlers):
        package.addHandler(_Shown())


class _Shown(logging.StreamHandler):
    """Writes to whatever stderr is at the time."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
