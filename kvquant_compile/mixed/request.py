"""``bits=2.5`` and ``bits="auto", budget=...``: what may be chosen, checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from kvquant_compile.errors import OptionError

AUTO = "auto"
MOST = 8
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|KiB)")
_UNITS = {"B": 1, "kB": 1000, "KiB": 1024}
METHODS = ("measured", "fisher")


@dataclass(frozen=True)
class MixedBits:
    """Widths to be chosen by sensitivity. Exactly one of the first three is not None.

    Attributes:
        mean: the bytes of a mixture of the two whole widths around it.
        effective_bits: stored bits per element of a full page, everything included.
        token_bytes: bytes of a token of one sequence, all layers.
        method: how sensitivity is found: "measured" through the model, or "fisher" from
            calibration's gradients, without further passes.
    """

    mean: float | None = None
    effective_bits: float | None = None
    token_bytes: float | None = None
    method: str = "measured"

    @staticmethod
    def make(bits: Any, budget: Any = None, method: str = "measured") -> MixedBits | None:
        """A request; None where ``bits`` is none of a mixture.

        Raises:
            OptionError: ``bits`` and ``budget`` do not belong together, or out of range.
        """
        if method not in METHODS:
            raise OptionError(
                f"allocation={method!r}",
                why=f"it is one of {', '.join(METHODS)}",
                do="Leave it out for the default.",
            )
        if bits == AUTO:
            return _within(budget, method)
        if budget is not None:
            raise OptionError(
                f"budget={budget!r} with bits={bits!r}",
                why="a budget chooses the widths",
                do='Pass bits="auto" with it.',
            )
        if not isinstance(bits, float) or bits.is_integer():
            return None
        if not 1 < bits < MOST:
            raise OptionError(
                f"bits={bits!r}",
                why=f"a fraction lies between the widths 1 and {MOST}",
                do="Pass bits=2.5, for example.",
            )
        return MixedBits(mean=bits, method=method)

    @property
    def asked(self) -> str:
        """In words, for reports."""
        if self.mean is not None:
            return f"{self.mean:g} bits"
        if self.effective_bits is not None:
            return f"{self.effective_bits:g} effective bits"
        return f"{self.token_bytes:g} bytes a token"

    @property
    def placeholder(self) -> int:
        """A whole width, where one is needed before any is chosen."""
        return math.floor(self.mean) if self.mean is not None else 3


def _within(budget: Any, method: str) -> MixedBits:
    if isinstance(budget, str):
        match = _BYTES.fullmatch(budget.strip())
        if match is not None:
            return MixedBits(token_bytes=float(match[1]) * _UNITS[match[2]], method=method)
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not number or not 0 < budget < 16:
        raise OptionError(
            f'bits="auto" with budget={budget!r}',
            why="a budget is a number of effective bits per element below 16, or bytes a token",
            do='Pass budget=2.9, or budget="1.5 kB".',
        )
    return MixedBits(effective_bits=float(budget), method=method)
