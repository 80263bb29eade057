"""What ``>>`` and ``+`` make: chains of stages, pipelines, and sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvquant_compile.codec.algebra.base import Block, Codec, Constants, Sample, Stage
from kvquant_compile.codec.algebra.parts import Part, Parts

FIT_TOKENS = 8192
"""What residual codes are fitted to at most: every term codes all of it once more."""


@dataclass(frozen=True)
class Chain(Stage):
    """Several stages, the first first; what ``stage >> stage`` makes."""

    stages: tuple[Stage, ...]

    @property
    def calibrated(self) -> bool:
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
    def calibrated(self) -> bool:
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
    def calibrated(self) -> bool:
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
        """Each on the error of those before it, on tokens spread over all there are."""
        units = sample.units(self.tokens)
        units = units[:, :, :: max(1, -(-units.shape[2] * self.tokens // FIT_TOKENS))]
        found: list[Constants] = []
        for term in self.terms:
            found.append(term.fit(sample.holding(units)))
            units = units - term.decode(term.encode(units, found[-1]), found[-1])
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


def followed_by(stage: Stage, other: Stage | Codec) -> Chain | Pipeline:
    """``stage >> other``, chains and pipelines flattened."""
    first = stage.stages if isinstance(stage, Chain) else (stage,)
    if isinstance(other, Chain):
        return Chain(first + other.stages)
    if isinstance(other, Stage):
        return Chain((*first, other))
    if isinstance(other, Pipeline):
        return Pipeline(first + other.stages, other.codec)
    return Pipeline(first, other)


def added(a: Codec, b: Codec) -> Sum:
    """``a + b``, sums flattened."""
    first, second = (x.terms if isinstance(x, Sum) else (x,) for x in (a, b))
    return Sum(first + second)


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
