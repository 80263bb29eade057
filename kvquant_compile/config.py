"""The options of ``optimize``, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvquant_compile.codec.layout import lossless_spec
from kvquant_compile.codec.spec import LOSSLESS, CodecSpec
from kvquant_compile.errors import OptionError

Bits = int | tuple[int, int]
Slots = int | tuple[int, int]

SLOTS, RECENT = (1, 0), 16
"""One exact outlier of every key, none of values, and 16 exact last tokens: on llama-63m a third
less divergence than with a slot for both and no such tokens, in fewer bytes from 3000 tokens of
context on, and every slot that is not there makes decoding faster (docs/accuracy.md)."""
MOST_RECENT = 1024
"""More exact last tokens than this would be another kind of cache."""


@dataclass(frozen=True)
class FormatOptions:
    """What the user asked of the storage format.

    Attributes:
        bits: a width for keys and values, a (key, value) pair, or cache index -> either.
        slots: outlier slots per (token, head) of keys and of values, 0..4, or a pair of both.
        sinks: leading tokens kept exactly, 0..64.
        recent_window: last tokens kept exactly, a multiple of 16 up to 1024.
    """

    bits: Bits | Mapping[int, Bits] = 3
    slots: Slots = SLOTS
    sinks: int = 1
    recent_window: int = RECENT

    def __post_init__(self) -> None:
        pair = self.slots if isinstance(self.slots, tuple | list) else (self.slots,) * 2
        if len(pair) != 2 or not all(_is_whole(value, 4) for value in pair):
            raise OptionError(
                f"slots={self.slots!r}",
                why="it must be a whole number from 0 to 4, or a pair of them (keys, values)",
                do="Leave it out for the default.",
            )
        if not _is_whole(self.sinks, 64):
            raise OptionError(
                f"sinks={self.sinks!r}",
                why="it must be a whole number from 0 to 64",
                do="Leave it out for the default.",
            )
        recent = self.recent_window
        if type(recent) is not int or recent % 16 or not 0 <= recent <= MOST_RECENT:
            raise OptionError(
                f"recent_window={recent!r}",
                why=f"it must be a multiple of 16 from 0 to {MOST_RECENT}",
                do="Leave it out for the default.",
            )
        values = self.bits.values() if isinstance(self.bits, Mapping) else [self.bits]
        for value in values:
            _pair(value)

    @staticmethod
    def make(
        bits: Bits | Mapping[int, Bits] | None,
        slots: Slots | None,
        sinks: int | None,
        recent_window: int | None = None,
    ) -> FormatOptions:
        """Options from what the user gave; None takes the default."""
        asked = {"bits": bits, "slots": slots, "sinks": sinks, "recent_window": recent_window}
        return FormatOptions(**{k: v for k, v in asked.items() if v is not None})  # type: ignore[arg-type]

    def specs(self, indices: Sequence[int]) -> dict[int, CodecSpec]:
        """The format of every cache layer.

        Raises:
            OptionError: ``bits`` is a mapping that misses a layer, or names one there is not.
        """
        unknown = set(self.bits) - set(indices) if isinstance(self.bits, Mapping) else set()
        if unknown:
            raise OptionError(
                "bits names layers that the model has not",
                where=", ".join(sorted(map(repr, unknown))),
                why=f"its cache layers are {', '.join(map(str, indices))}",
                do="Drop these entries.",
            )
        return {index: self.spec(index) for index in indices}

    def pairs(self, indices: Sequence[int]) -> dict[int, tuple[int, int]]:
        """(key bits, value bits) of every cache layer; raises as :meth:`specs` does."""
        specs = self.specs(indices)
        return {index: (spec.key_bits, spec.value_bits) for index, spec in specs.items()}

    def spec(self, index: int) -> CodecSpec:
        """The format of one cache layer.

        Raises:
            OptionError: ``bits`` is a mapping without this layer.
        """
        bits = self.bits
        if isinstance(bits, Mapping):
            if index not in bits:
                raise OptionError(
                    "bits does not name every layer",
                    where=f"layer {index}",
                    why="a mapping must give the width of each cache layer",
                    do=f"Add an entry for layer {index}, or pass one width for all.",
                )
            bits = bits[index]
        key, value = _pair(bits)
        if key == LOSSLESS:
            return lossless_spec()
        key_slots, value_slots = self.slot_pair
        return CodecSpec(key, value, key_slots, value_slots, True, self.sinks, self.recent_window)

    @property
    def slot_pair(self) -> tuple[int, int]:
        """Outlier slots of keys and of values."""
        slots = self.slots
        return (slots, slots) if isinstance(slots, int) else (slots[0], slots[1])


def _pair(bits: Any) -> tuple[int, int]:
    pair = bits if isinstance(bits, tuple | list) else (bits, bits)
    if len(pair) != 2 or not all(_is_width(b) for b in pair):
        raise OptionError(
            f"bits={bits!r}",
            why="a width is a whole number from 1 to 8, or 16 for lossless storage",
            do="Pass bits=3, a pair (key_bits, value_bits), {layer: width}, or, for a mixture, a "
            'fraction such as 2.5 or "auto" with a budget.',
        )
    if (pair[0] == LOSSLESS) != (pair[1] == LOSSLESS):
        raise OptionError(
            f"bits={bits!r}",
            why="lossless storage holds keys and values alike",
            do="Pass bits=16, or widths from 1 to 8 for both.",
        )
    return pair[0], pair[1]


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_width(bits: Any) -> bool:
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    return whole and (1 <= bits <= 8 or bits == LOSSLESS)
