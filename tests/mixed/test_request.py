"""What may be asked for."""

from __future__ import annotations

from typing import Any

import pytest

from kvquant_compile.errors import OptionError
from kvquant_compile.mixed.request import MixedBits


@pytest.mark.parametrize("bits", [None, 3, 16, (4, 2), {0: 2}, 3.0, "nonsense"])
def test_whole_widths_are_no_mixture(bits: Any) -> None:
    assert MixedBits.make(bits) is None


def test_fractions_and_budgets() -> None:
    assert MixedBits.make(2.5) == MixedBits(mean=2.5)
    assert MixedBits.make("auto", 2.9) == MixedBits(effective_bits=2.9)
    assert MixedBits.make("auto", 3) == MixedBits(effective_bits=3.0)
    for text, size in (("900 B", 900), ("1.5kB", 1500), ("2 KiB", 2048)):
        assert MixedBits.make("auto", text) == MixedBits(token_bytes=size)
    assert MixedBits.make(2.5, method="fisher") == MixedBits(mean=2.5, method="fisher")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.5,), "fraction"),
        ((8.5,), "fraction"),
        (("auto",), "budget"),
        (("auto", 0), "budget"),
        (("auto", 16), "budget"),
        (("auto", True), "budget"),
        (("auto", "2 MB"), "budget"),
        ((3, 2.9), "auto"),
        ((2.5, 2.9), "auto"),
        ((2.5, None, "guessed"), "allocation"),
    ],
    ids=str,
)
def test_refusals(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        MixedBits.make(*arguments)
