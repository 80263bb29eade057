"""What a codec is: blocks with ``encode``, ``decode``, their bits, and two ways to compose them.

A :class:`Codec` turns tokens of one layer, float32 [B, H, U, T, D] (U units of T tokens, T a
multiple of ``codec.tokens``), into named parts and back. A :class:`Stage` changes tokens before a
codec and undoes that after it; it may store parts of its own (a scale, outliers)::

    Hadamard() >> Normalise("std") >> Lut(3)      # stages, then a codec
    Affine(2, axis="channel", group=64) + LowRank(2, tokens=64)      # the second codes the error

Both operators are associative. Blocks are frozen descriptions; what calibration finds travels
beside them as a tuple of tensors, ``constants``, in the order of ``names``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, overload

import torch
from torch import Tensor

from kvquant_compile.codec.algebra.pack import pack_codes, packed_bytes, unpack_codes

Constants = tuple[Tensor, ...]
Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Part:
    """One stored array of one head and unit.

    Attributes:
        name: for people.
        shape: without the leading [B, H, U].
        bits: of an element.
        dtype: of the tensor; integers are codes below ``2**bits``, floats are stored as they are.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    dtype: torch.dtype = torch.uint8

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Whole bytes."""
        return packed_bytes(self.count, self.bits)


def float16_part(name: str, *shape: int) -> Part:
    """A part of float16 numbers."""
    return Part(name, shape, 16, torch.float16)


def code_part(name: str, bits: int, *shape: int) -> Part:
    """A part of codes below ``2**bits``."""
    return Part(name, shape, bits, torch.uint8 if bits <= 8 else torch.int32)


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

    calibrated: ClassVar[bool] = False
    """Whether ``fit`` looks at the sample's tokens."""

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
        """Undo :meth:`forward`."""

    @overload
    def __rshift__(self, other: Stage) -> Chain: ...

    @overload
    def __rshift__(self, other: Codec) -> Pipeline: ...

    def __rshift__(self, other: Block) -> Pipeline | Chain:
        if isinstance(other, Stage):
            return Chain(stages_of(self) + stages_of(other))
        if isinstance(other, Pipeline):
            return Pipeline(stages_of(self) + other.stages, other.codec)
        if isinstance(other, Codec):
            return Pipeline(stages_of(self), other)
        return NotImplemented


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
        """The map."""

    @abstractmethod
    def undo(self, y: Tensor, constants: Constants) -> Tensor:
        """Its inverse."""


class Codec(Block):
    """Tokens to parts and back."""

    @abstractmethod
    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """Parts of tokens float32 [B, H, U, T, D], each [B, H, U, *shape]."""

    @abstractmethod
    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """Tokens float32 [B, H, U, T, D] of parts."""

    def error_bound(self, x: Tensor, constants: Constants) -> Tensor | None:
        """Largest error of every element of finite tokens in range; None where none is known."""
        return None

    def __add__(self, other: Codec) -> Sum:
        if not isinstance(other, Codec):
            return NotImplemented
        return Sum(_terms(self) + _terms(other))

    def unit_bytes(self, tokens: int, dim: int) -> int:
        """Bytes of ``tokens`` tokens of one head; every part starts at a byte."""
        return sum(part.nbytes for part in self.parts(tokens, dim))

    def encode_bytes(self, x: Tensor, constants: Constants) -> Tensor:
        """Tokens [B, H, U, T, D] -> uint8 [B, H, U, unit_bytes]."""
        parts = self.parts(*x.shape[-2:])
        data = self.encode(x.float(), constants)
        return torch.cat([_to_bytes(p, d) for p, d in zip(parts, data, strict=True)], -1)

    def decode_bytes(self, data: Tensor, constants: Constants, tokens: int, dim: int) -> Tensor:
        """Inverse of :meth:`encode_bytes`: float32 [B, H, U, tokens, dim]."""
        out, at = [], 0
        for part in self.parts(tokens, dim):
            out.append(_from_bytes(part, data[..., at : at + part.nbytes]))
            at += part.nbytes
        return self.decode(tuple(out), constants)


@dataclass(frozen=True)
class Chain(Stage):
    """Several stages, the first first; what ``stage >> stage`` makes."""

    stages: tuple[Stage, ...]

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        """Whether any of them is."""
        return any(stage.calibrated for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Their least common multiple."""
        return math.lcm(*(stage.tokens for stage in self.stages))

    @property
    def names(self) -> tuple[str, ...]:
        """All of theirs."""
        return joined_names(self.stages)

    def fit(self, sample: Sample) -> Constants:
        """Each on what the ones before it leave."""
        found: list[Constants] = []
        for stage in self.stages:
            found.append(stage.fit(sample))
            sample = sample.holding(stage.forward(sample.units(self.tokens), found[-1])[0])
        return sum(found, ())

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """All of theirs."""
        return tuple(p for stage in self.stages for p in stage.parts(tokens, dim))

    def forward(self, x: Tensor, constants: Constants) -> tuple[Tensor, Parts]:
        """One after the other."""
        stored: Parts = ()
        for stage, own in zip(self.stages, split_constants(self.stages, constants), strict=True):
            x, parts = stage.forward(x, own)
            stored += parts
        return x, stored

    def inverse(self, y: Tensor, parts: Parts, constants: Constants) -> Tensor:
        """In the opposite order."""
        given = split(parts, [stage.part_count for stage in self.stages])
        own = split_constants(self.stages, constants)
        for stage, part, constant in reversed(list(zip(self.stages, given, own, strict=True))):
            y = stage.inverse(y, part, constant)
        return y


@dataclass(frozen=True)
class Pipeline(Codec):
    """Stages, then a codec; what ``stage >> codec`` makes."""

    stages: tuple[Stage, ...]
    codec: Codec

    @property
    def chain(self) -> Chain:
        """The stages as one."""
        return Chain(self.stages)

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        """Whether any of them is."""
        return self.chain.calibrated or self.codec.calibrated

    @property
    def tokens(self) -> int:
        """Their least common multiple."""
        return math.lcm(self.chain.tokens, self.codec.tokens)

    @property
    def names(self) -> tuple[str, ...]:
        """The stages', then the codec's."""
        return joined_names((*self.stages, self.codec))

    def fit(self, sample: Sample) -> Constants:
        """The codec is fitted to what the stages leave."""
        stages = self.chain.fit(sample)
        left, _ = self.chain.forward(sample.units(self.tokens), stages)
        return stages + self.codec.fit(sample.holding(left))

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """The stages', then the codec's."""
        return self.chain.parts(tokens, dim) + self.codec.parts(tokens, dim)

    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """The stages' parts, then the codec's."""
        stages, own = self._constants(constants)
        y, parts = self.chain.forward(x, stages)
        return parts + self.codec.encode(y, own)

    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """Decode, then undo the stages."""
        stages, own = self._constants(constants)
        count = self.chain.part_count
        return self.chain.inverse(self.codec.decode(parts[count:], own), parts[:count], stages)

    def _constants(self, constants: Constants) -> tuple[Constants, Constants]:
        count = len(self.chain.names)
        return constants[:count], constants[count:]


@dataclass(frozen=True)
class Sum(Codec):
    """Every term codes what the terms before it left; what ``codec + codec`` makes."""

    terms: tuple[Codec, ...]

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        """Whether any of them is."""
        return any(term.calibrated for term in self.terms)

    @property
    def tokens(self) -> int:
        """Their least common multiple."""
        return math.lcm(*(term.tokens for term in self.terms))

    @property
    def names(self) -> tuple[str, ...]:
        """All of theirs."""
        return joined_names(self.terms)

    def fit(self, sample: Sample) -> Constants:
        """Each on the error of those before it."""
        found: list[Constants] = []
        for term in self.terms:
            found.append(term.fit(sample))
            x = sample.units(self.tokens)
            sample = sample.holding(x - term.decode(term.encode(x, found[-1]), found[-1]))
        return sum(found, ())

    def parts(self, tokens: int, dim: int) -> tuple[Part, ...]:
        """All of theirs."""
        return tuple(p for term in self.terms for p in term.parts(tokens, dim))

    def encode(self, x: Tensor, constants: Constants) -> Parts:
        """The terms' parts."""
        stored: Parts = ()
        for term, own in zip(self.terms, split_constants(self.terms, constants), strict=True):
            parts = term.encode(x, own)
            x = x - term.decode(parts, own)
            stored += parts
        return stored

    def decode(self, parts: Parts, constants: Constants) -> Tensor:
        """The sum of the terms."""
        given = split(parts, [term.part_count for term in self.terms])
        own = split_constants(self.terms, constants)
        decoded = [t.decode(p, c) for t, p, c in zip(self.terms, given, own, strict=True)]
        total = decoded[0]
        for more in decoded[1:]:
            total = total + more
        return total


def stages_of(stage: Stage) -> tuple[Stage, ...]:
    """The stages of a chain, or the stage itself."""
    return stage.stages if isinstance(stage, Chain) else (stage,)


def _terms(codec: Codec) -> tuple[Codec, ...]:
    return codec.terms if isinstance(codec, Sum) else (codec,)


def joined_names(blocks: Sequence[Block]) -> tuple[str, ...]:
    """Names of several blocks' constants, numbered by block."""
    return tuple(f"{i}_{name}" for i, block in enumerate(blocks) for name in block.names)


def split(items: tuple[Tensor, ...], counts: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Consecutive runs of the given lengths."""
    out, at = [], 0
    for count in counts:
        out.append(items[at : at + count])
        at += count
    return out


def split_constants(blocks: Sequence[Block], constants: Constants) -> list[Constants]:
    """The constants of every block."""
    return split(constants, [len(block.names) for block in blocks])


def _to_bytes(part: Part, data: Tensor) -> Tensor:
    lead = data.shape[: data.ndim - len(part.shape)]
    flat = data.reshape(*lead, part.count)
    if part.dtype.is_floating_point:
        return flat.to(part.dtype).contiguous().view(torch.uint8)
    return pack_codes(flat, part.bits)


def _from_bytes(part: Part, data: Tensor) -> Tensor:
    if part.dtype.is_floating_point:
        flat = data.contiguous().view(part.dtype)
    else:
        flat = unpack_codes(data, part.bits, part.count)
    return flat.reshape(*data.shape[:-1], *part.shape)
