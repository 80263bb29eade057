"""What the laboratory compares: a recipe at a width, spelled as on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvquant_compile.config import Bits, Slots
from kvquant_compile.errors import OptionError
from kvquant_compile.mixed.request import MixedBits
from kvquant_compile.recipes import NAMED
from kvquant_compile.recipes.choice import OURS, PUBLISHED, Choice, choose

ORIGINAL, BF16, RELEASED, FP8 = "original", "bf16", "kvquant-released", "fp8"
WIDTHLESS = (BF16, FP8)
SIMULATED = (BF16, RELEASED)
"""Codecs that have no pages here: they are read back on the spot, in the same graph."""

SLOTTED = (OURS, PUBLISHED)
"""Recipes whose exact elements can be asked for: ``kvquant+@0r16`` has no outlier slots, and 16
exact last tokens; ``kvquant+@1/0`` has a slot for keys and none for values."""

_EXACT = re.compile(r"(?:(\d+)(?:/(\d+))?)?(?:r(\d+))?")
_PAIR = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Point:
    """A recipe at a width.

    Attributes:
        recipe: a name of :mod:`kvquant_compile.recipes`, "kvquant+@0r16" with its numbers of
            outlier slots and of exact last tokens, or "bf16" or "kvquant-released".
        bits: "3", "4/2" (keys, values), "2.5", "auto:2.9" (a budget of effective bits); empty
            for recipes with a width of their own.
    """

    recipe: str
    bits: str = ""

    @property
    def name(self) -> str:
        """For tables."""
        return self.recipe if not self.bits else f"{self.recipe} {self.bits}"

    @property
    def nominal(self) -> float:
        """The width in a code, the mean of keys and values."""
        if not self.bits:
            return 8.0 if self.recipe == FP8 else 16.0
        parts = [float(part) for part in self.bits.removeprefix("auto:").split("/")]
        return sum(parts) / len(parts)

    def choice(self) -> tuple[Choice, MixedBits | None]:
        """The checked recipe, and how its widths are to be chosen if they are.

        Raises:
            OptionError: the recipe has no such width.
        """
        recipe, _, text = self.recipe.partition("@")
        slots, recent = _exact(text)
        if not self.bits:
            return choose(recipe, None, slots, None, recent), None
        if self.bits.startswith("auto:"):
            mixed: MixedBits | None = MixedBits.make("auto", float(self.bits[5:]))
        else:
            mixed = MixedBits.make(float(self.bits)) if "." in self.bits else None
        bits = self._whole() if mixed is None else mixed.placeholder
        return choose(recipe, bits, slots, None, recent), mixed

    def whole(self) -> int:
        """The width of a recipe that has one for keys and values alike.

        Raises:
            OptionError: it is none.
        """
        bits = self._whole()
        if isinstance(bits, tuple):
            raise _no_width(self.bits)
        return bits

    def _whole(self) -> Bits:
        pair = _PAIR.fullmatch(self.bits)
        if pair:
            return int(pair[1]), int(pair[2])
        if not self.bits.isdigit():
            raise _no_width(self.bits)
        return int(self.bits)


def parse_points(recipes: str, bits: str) -> list[Point]:
    """Every recipe at every width, lists separated by commas, in order and once each; only whole
    widths of ``kvquant-released``.

    Raises:
        OptionError: a name or a width is not known.
    """
    names = [name.strip() for name in recipes.split(",") if name.strip()]
    widths = [width.strip() for width in bits.split(",") if width.strip()]
    known = (OURS, PUBLISHED, *NAMED, BF16, RELEASED)
    for name in names:
        plain, at, exact = name.partition("@")
        if plain not in (SLOTTED if at else known) or (at and not _is_exact(exact)):
            raise OptionError(
                f"--recipes {recipes}",
                why=f"{name!r} is none of {', '.join(known)}",
                do=f"Name some of these, separated by commas; {OURS}@0 has no outlier slots, "
                f"{OURS}@0r16 none and 16 exact last tokens.",
            )
    for width in widths:
        _check(width)
    whole = [width for width in widths if width.isdigit()]
    of_name = {BF16: [""], FP8: [""], RELEASED: whole}
    points = [Point(name, width) for name in names for width in of_name.get(name, widths)]
    return list(dict.fromkeys(points))


def grid_points(recipe: str, widths: Sequence[int]) -> list[Point]:
    """A recipe at every pair of key and value widths; equal ones are the plain width."""
    return [
        Point(recipe, str(key) if key == value else f"{key}/{value}")
        for key in widths
        for value in widths
    ]


def _is_exact(text: str) -> bool:
    return bool(text) and _EXACT.fullmatch(text) is not None


def _exact(text: str) -> tuple[Slots | None, int | None]:
    """Outlier slots and exact last tokens that a name asks for."""
    found = _EXACT.fullmatch(text)
    assert found, "checked where points are parsed"
    keys, values, recent = (None if part is None else int(part) for part in found.groups())
    slots = keys if keys is None or values is None else (keys, values)
    return slots, recent


def _check(width: str) -> None:
    text = width.removeprefix("auto:")
    budget = text != width
    try:
        number = [float(part) for part in text.split("/")]
    except ValueError as error:
        raise _no_width(width) from error
    if len(number) > 2 or (len(number) == 2 and (budget or "." in text)):
        raise _no_width(width)
    if not budget:
        Point(OURS, width).choice()
    else:
        MixedBits.make("auto", number[0])


def _no_width(width: str) -> OptionError:
    return OptionError(
        f"--bits {width}",
        why="a width is a whole number, a fraction, key/value, or auto:effective bits",
        do="Pass --bits 4,3,2.5,2 or --bits 4/2,auto:2.9.",
    )
