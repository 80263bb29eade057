"""A recipe: how one layer's keys and values are stored, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.affine import Affine
from kvquant_compile.codec.algebra.base import Codec, Constants, Sample
from kvquant_compile.codec.algebra.checks import check
from kvquant_compile.codec.algebra.compose import Chain, Pipeline, Sum
from kvquant_compile.codec.algebra.floats import Fp8, LowRank, Raw
from kvquant_compile.codec.algebra.maps import (
    Centre,
    ChannelScale,
    Hadamard,
    Interleave,
    Reorder,
    Rotation,
)
from kvquant_compile.codec.algebra.stored_stages import Normalise, Outliers
from kvquant_compile.codec.algebra.tables import Lut, Vq
from kvquant_compile.codec.algebra.text import from_text, to_text
from kvquant_compile.codec.spec import PAGE_TOKENS


@dataclass(frozen=True)
class Tail:
    """Which of a sequence's last tokens are kept exactly.

    Tokens are packed in order, ``flush`` at a time, as soon as ``recent`` tokens stay behind
    them: of L tokens the first ``(L - recent) // flush * flush`` are packed.

    Attributes:
        recent: tokens that are always exact.
        flush: tokens packed at a time; 0 for the codec's own unit.
    """

    recent: int = 0
    flush: int = 0

    def __post_init__(self) -> None:
        check(self.recent >= 0 and self.flush >= 0, str(self), "numbers of tokens are not negative")

    def packed(self, tokens: int, length: Tensor) -> Tensor:
        """How many of ``length`` tokens (integers) are packed, for a codec of ``tokens``."""
        unit = self.flush or tokens
        return (length - self.recent).clamp_min(0) // unit * unit

    def most(self, tokens: int) -> int:
        """Most tokens that are not packed."""
        return self.recent + (self.flush or tokens) - 1


@dataclass(frozen=True)
class Recipe:
    """The format of one layer's cache.

    Attributes:
        name: for reports.
        keys, values: codecs.
        pre_rope: whether keys are stored before RoPE.
        sinks: leading tokens of every sequence kept exactly.
        key_tail, value_tail: last tokens kept exactly; the incomplete unit of a codec always is.
    """

    name: str
    keys: Codec
    values: Codec
    pre_rope: bool = True
    sinks: int = 0
    key_tail: Tail = field(default_factory=Tail)
    value_tail: Tail = field(default_factory=Tail)

    def __post_init__(self) -> None:
        check(0 <= self.sinks <= PAGE_TOKENS, f"sinks={self.sinks}", f"it is 0 to {PAGE_TOKENS}")
        for kind, codec, tail in self.kinds():
            check(
                PAGE_TOKENS % codec.tokens == 0,
                f"{kind} coded {codec.tokens} tokens at a time",
                f"a page holds {PAGE_TOKENS}",
            )
            check(
                tail.flush % codec.tokens == 0,
                f"{kind} packed {tail.flush} tokens at a time",
                f"they are coded {codec.tokens} at a time",
            )

    def __str__(self) -> str:
        return to_text(self, KNOWN)

    @staticmethod
    def parse(text: str) -> Recipe:
        """Inverse of ``str``.

        Raises:
            ValueError: it is no recipe.
            OptionError: a block of it is not there.
        """
        found = from_text(text, KNOWN)
        if not isinstance(found, Recipe):
            raise ValueError(f"not a recipe: {text!r}")
        return found

    def kinds(self) -> tuple[tuple[str, Codec, Tail], ...]:
        """("key" or "value", codec, tail) of both."""
        return ("key", self.keys, self.key_tail), ("value", self.values, self.value_tail)

    @property
    def lossless(self) -> bool:
        """False: a recipe's pages are codes."""
        return False

    @property
    def sink_tokens(self) -> int:
        """As formats without blocks call it."""
        return self.sinks

    @property
    def calibrated(self) -> bool:
        """Whether calibration tokens are needed."""
        return self.keys.calibrated or self.values.calibrated

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all constants, the keys' first."""
        return tuple(f"{kind}_{name}" for kind, codec, _ in self.kinds() for name in codec.names)

    def fit(self, keys: Sample, values: Sample) -> RecipeTables:
        """The constants of one layer."""
        found = self.keys.fit(keys) + self.values.fit(values)
        return RecipeTables(self.names, tuple(t.contiguous() for t in found))

    def constants(self, tables: tuple[Tensor, ...] | list[Tensor]) -> tuple[Constants, Constants]:
        """The keys' and the values' share of all constants."""
        count = len(self.keys.names)
        return tuple(tables[:count]), tuple(tables[count:])


@dataclass(frozen=True, eq=False)
class RecipeTables:
    """The calibrated constants of one layer: ``recipe.names`` and as many tensors."""

    names: tuple[str, ...]
    constants: Constants

    def __repr__(self) -> str:
        shapes = (f"{name} {tuple(t.shape)}" for name, t in self.tensors().items())
        return f"RecipeTables({', '.join(shapes)})"

    def to(self, device: torch.device | str) -> RecipeTables:
        """The same constants on another device."""
        return RecipeTables(self.names, tuple(t.to(device) for t in self.constants))

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, in order."""
        return dict(zip(self.names, self.constants, strict=True))


_CLASSES: tuple[type, ...] = (
    Affine, Centre, Chain, ChannelScale, Fp8, Hadamard, Interleave, LowRank, Lut, Normalise,
    Outliers, Pipeline, Raw, Recipe, Reorder, Rotation, Sum, Tail, Vq,
)  # fmt: skip
KNOWN = {kind.__name__: kind for kind in _CLASSES}
