"""Numbers of bytes as people write them."""

from __future__ import annotations

import re
from typing import Any

from kvquant_compile.errors import OptionError

_UNITS = {
    unit: base**power
    for base, names in ((1000, ("B", "kB", "MB", "GB", "TB")),
                        (1024, ("B", "KiB", "MiB", "GiB", "TiB")))
    for power, unit in enumerate(names)
}  # fmt: skip
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)\s*")


def parse_bytes(memory: Any) -> int:
    """Bytes from a number of bytes or a text such as "24 GB" (10^9) or "24 GiB" (2^30).

    Raises:
        OptionError: it is neither, or not positive.
    """
    number = memory if isinstance(memory, int | float) and not isinstance(memory, bool) else None
    match = _TEXT.fullmatch(memory) if isinstance(memory, str) else None
    if match is not None and match[2] in _UNITS:
        number = float(match[1]) * _UNITS[match[2]]
    if number is None or not 0 < number < float("inf"):
        raise OptionError(
            f"memory={memory!r}",
            why="it is a positive number of bytes, or a text with a unit",
            do='Pass memory="24 GB", "24 GiB" or a number of bytes.',
        )
    return int(number)


def readable(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
