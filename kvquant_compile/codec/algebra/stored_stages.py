"""Stages that store what they take away: a token's size, and its outliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.base import Constants, Stage
from kvquant_compile.codec.algebra.checks import check
from kvquant_compile.codec.algebra.numbers import AXES, as_rows, nonzero, saturated, to_float16
from kvquant_compile.codec.algebra.parts import Part, Parts, code_part, float16_part

_STATS = ("std", "rms", "absmax")


@dataclass(frozen=True)
class Normalise(Stage):
    """Divide every token (of a head) by its own size, one float16 each.

    Attributes:
        stat: "std" about its mean (which stays), "rms" or "absmax".
    """

    stat: str = "std"

    def __post_init__(self) -> None:
        check(self.stat in _STATS, f"Normalise(stat={self.stat!r})", f"it is one of {_STATS}")

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """The sizes."""
        return (float16_part("size", tokens, 1),)

    def forward(self, x: Tensor, constants: Constants) -> tuple[Tensor, Parts]:
        """Divide by the size as it is stored.

        Sums are in float64, so that their order, which on a GPU depends on how many tokens there
        are, changes nothing.
        """
        finite = saturated(x)
        if self.stat == "std":
            size = finite.double().std(-1, keepdim=True)
        elif self.stat == "rms":
            size = finite.double().square().mean(-1, keepdim=True).sqrt()
        else:
            size = finite.abs().amax(-1, keepdim=True)
        size = to_float16(size)
        return finite / nonzero(size.float()), (size,)

    def inverse(self, y: Tensor, parts: Parts, constants: Constants) -> Tensor:
        """Multiply; a token of size 0 comes back as its codes say, unscaled."""
        return y * nonzero(parts[0].float())


@dataclass(frozen=True)
class Outliers(Stage):
    """Keep the extremes of every row exactly (in float16), the mean of the others in their place.

    Attributes:
        count: elements kept, one half the largest, the other the smallest ones.
        axis: "token": per token and head; "channel": per channel, in groups of tokens.
        group: tokens of a group for "channel".
    """

    count: int = 2
    axis: str = "token"
    group: int = 0

    def __post_init__(self) -> None:
        check(self.count > 0, f"Outliers(count={self.count})", "there is at least one")
        check(self.axis in AXES, f"Outliers(axis={self.axis!r})", f"it is one of {AXES}")
        check((self.group > 0) == (self.axis == "channel"), str(self),
              "a group of tokens belongs to axis='channel', and to it alone")  # fmt: skip

    @property
    def tokens(self) -> int:
        """The group, where it runs over tokens."""
        return self.group or 1

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """Places and values."""
        rows, row = (tokens, dim) if self.axis == "token" else (dim * tokens // self.group,
                                                                self.group)  # fmt: skip
        place = max(1, (row - 1).bit_length())
        return (
            code_part("place", place, rows, self.count),
            float16_part("value", rows, self.count),
        )

    def forward(self, x: Tensor, constants: Constants) -> tuple[Tensor, Parts]:
        """Take the extremes out; NaN counts as largest."""
        rows = self._rows(x)
        high = self.count - self.count // 2
        places = rows.topk(high, dim=-1).indices
        if self.count > 1:
            rest = rows.scatter(-1, places, torch.inf)
            low = rest.topk(self.count - high, dim=-1, largest=False).indices
            places = torch.cat([places, low], -1)
        kept = rows.gather(-1, places)
        total = rows.scatter(-1, places, 0.0).sum(-1, keepdim=True)
        mean = total / max(1, rows.shape[-1] - self.count)
        changed = rows.scatter(-1, places, mean.expand(kept.shape))
        return self._unrows(changed, x), (self._part(places), self._part(to_float16(kept)))

    def inverse(self, y: Tensor, parts: Parts, constants: Constants) -> Tensor:
        """Put the extremes back."""
        rows = self._rows(y)
        places, kept = (part.reshape(*rows.shape[:-1], self.count) for part in parts)
        return self._unrows(rows.scatter(-1, places.long(), kept.float()), y)

    def _rows(self, x: Tensor) -> Tensor:
        rows = as_rows(x, self.axis)
        return rows.unflatten(-1, (-1, self.group)) if self.group else rows

    def _unrows(self, rows: Tensor, x: Tensor) -> Tensor:
        flat = rows.flatten(-2) if self.group else rows
        return as_rows(flat.reshape(as_rows(x, self.axis).shape), self.axis)

    def _part(self, x: Tensor) -> Tensor:
        return x.flatten(-3, -2) if self.group else x
