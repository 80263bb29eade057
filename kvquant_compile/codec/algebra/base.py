"""What a codec is: blocks with ``encode``, ``decode``, their bits, and two ways to compose them.

A :class:`Codec` turns tokens of one layer, float32 [B, H, U, T, D] (U units of T tokens, T a
multiple of ``codec.tokens``), into named parts and back. A :class:`Stage` changes tokens before a
codec and undoes that after it; it may store parts of its own (a scale, outliers)::

    Hadamard() >> Normalise("std") >> Lut(3)      # stages, then a codec
    Affine(2, axis="channel", group=64) + LowRank(2, group=64)      # the second codes the error

Both operators are associative. Blocks are frozen descriptions; what calibration finds travels
beside them as a tuple of tensors, ``constants``, in the order of ``names``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, overload

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.parts import Part, Parts, pack_parts, runs, unpack_parts

if TYPE_CHECKING:
    from kvquant_compile.codec.algebra.compose import Chain, Pipeline, Sum

Constants = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """What constants are fitted to.

    Attributes:
        x: float32 [H, N, D], calibration tokens; N is 0 where none were needed.
        pairs: channels that RoPE turns together; empty without RoPE.
        seed: of everything random.
    """

    x: Tensor
    pairs: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    def units(self, tokens: int) -> Tensor:
        """The tokens as [1, H, U, tokens, D]; an incomplete last unit is left out."""
        whole = self.x.shape[1] // tokens * tokens
        return self.x[None, :, :whole].unflatten(2, (-1, tokens))

    def holding(self, units: Tensor) -> Sample:
        """The same sample with other tokens [1, H, U, T, D]."""
        return replace(self, x=units[0].flatten(1, 2))

    def generator(self) -> torch.Generator:
        """A generator on the CPU, seeded."""
        return torch.Generator().manual_seed(self.seed)


class Block(ABC):
    """What stages and codecs have in common."""

    uses_data: ClassVar[bool] = False
    """Whether a block's own ``fit`` looks at the sample's tokens."""

    @property
    def calibrated(self) -> bool:
        """Whether fitting it, parts of it included, takes calibration tokens."""
        return self.uses_data

    @property
    def tokens(self) -> int:
        """Neighbouring tokens that are coded together; 1 where every token stands alone."""
        return 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the constants."""
        return ()

    def fit(self, sample: Sample) -> Constants:
        """The constants; deterministic for a sample."""
        return ()

    def effective_bits(self, dim: int, tokens: int = 0) -> float:
        """Stored bits per element for heads of ``dim`` channels, everything counted."""
        tokens = tokens or self.tokens
        return sum(p.count * p.bits for p in self.parts(tokens, dim)) / (tokens * dim)

    @property
    def part_count(self) -> int:
        """How many parts there are; the same for every size."""
        return len(self.parts(self.tokens, 1 << 10))

    @abstractmethod
    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """What is stored for ``tokens`` tokens of one head."""


class Stage(Block):
    """A change of tokens that is undone after the codec."""

    @abstractmethod
    def forward(self, x: Tensor, constants: Constants) -> tuple[Tensor, Parts]:
        """Changed tokens [B, H, U, T, D], and what has to be stored to undo it."""

    @abstractmethod
    def inverse(self, y: Tensor, parts: Parts, constants: Constants) -> Tensor:
        """Undo :meth:`forward`: tokens [B, H, U, T, D]."""

    @overload
    def __rshift__(self, other: Stage) -> Chain: ...

    @overload
    def __rshift__(self, other: Codec) -> Pipeline: ...

    def __rshift__(self, other: Block) -> Pipeline | Chain:
        from kvquant_compile.codec.algebra.compose import followed_by

        return followed_by(self, other) if isinstance(other, Stage | Codec) else NotImplemented


class Map(Stage):
    """A stage that stores nothing: an invertible map of channels, the same for every token."""

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """Nothing."""
        return ()

    def forward(self, x: Tensor, constants: Constants) -> tuple[Tensor, Parts]:
        """See :meth:`apply`."""
        return self.apply(x, constants), ()

    def inverse(self, y: Tensor, parts: Parts, constants: Constants) -> Tensor:
        """See :meth:`undo`."""
        return self.undo(y, constants)

    @abstractmethod
    def apply(self, x: Tensor, constants: Constants) -> Tensor:
        """The map, of tokens [B, H, U, T, D]."""

    @abstractmethod
    def undo(self, y: Tensor, constants: Constants) -> Tensor:
        """Its inverse, of tokens of the same shape."""


class Codec(Block):
    """Tokens to parts and back."""

    @abstractmethod
    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """Parts of tokens float32 [B, H, U, T, D], each [B, H, U, *shape]."""

    @abstractmethod
    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """Tokens float32 [B, H, U, T, D] of parts."""

    def error_bound(self, x: Tensor, constants: Constants) -> Tensor | None:
        """Largest error of every element of finite tokens x in range, of x's shape; None where none
        is known."""
        return None

    def __add__(self, other: Codec) -> Sum:
        from kvquant_compile.codec.algebra.compose import added

        return added(self, other) if isinstance(other, Codec) else NotImplemented

    def unit_bytes(self, tokens: int, dim: int) -> int:
        """Bytes of ``tokens`` tokens of one head; runs of parts of one width share bytes."""
        return sum(run.nbytes for run in runs(self.parts(tokens, dim)))

    def encode_bytes(self, x: Tensor, constants: Constants) -> Tensor:
        """Tokens [B, H, U, T, D] -> uint8 [B, H, U, unit_bytes]."""
        data = self.encode(x.float(), constants)
        return pack_parts(self.parts(*x.shape[-2:]), data)

    def decode_bytes(self, data: Tensor, constants: Constants, tokens: int, dim: int) -> Tensor:
        """Inverse of :meth:`encode_bytes`: float32 [B, H, U, tokens, dim]."""
        return self.decode(unpack_parts(self.parts(tokens, dim), data), constants)
