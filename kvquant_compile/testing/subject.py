"""Anything that quantises, seen alike: encode, decode, and the bytes in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvquant_compile.codec.algebra import Codec, Recipe, Sample
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.errors import OptionError
from kvquant_compile.testing.native import native_halves

Code = Any
"""A tensor, or a sequence, mapping or dataclass of codes; what ``encode`` returns."""


@runtime_checkable
class Quantiser(Protocol):
    """A codec of the user's own; ``tokens`` (default 1) may say how many it codes together."""

    def encode(self, x: Tensor) -> Code:
        """Tokens [B, H, N, D] to what is stored."""

    def decode(self, code: Code) -> Tensor:
        """What was stored, as tokens [B, H, N, D]."""


Testable = Codec | Recipe | CodecSpec | Quantiser | Callable[[Tensor], Tensor]
"""What the assertions take. A function is a round trip that stores what it returns."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A codec ready to be run.

    Attributes:
        name: for messages.
        encode, decode: tokens [B, H, N, D] to what is stored, and back.
        tokens: coded together; N must be a multiple.
        bound: largest error of every element, where it is known.
        declared: effective bits that the codec claims for heads of D channels, or None.
    """

    name: str
    encode: Callable[[Tensor], Code]
    decode: Callable[[Code], Tensor]
    tokens: int = 1
    bound: Callable[[Tensor], Tensor | None] = lambda x: None
    declared: Callable[[int], float | None] = lambda dim: None

    def trip(self, x: Tensor) -> Tensor:
        """There and back."""
        return self.decode(self.encode(x))


def subjects(codec: Testable, x: Tensor, calibration: Tensor | None = None) -> list[Subject]:
    """The codec, or the keys' and the values' codecs, ready to be run.

    Args:
        codec: see :data:`Testable`.
        x: tokens [B, H, N, D] that will be coded.
        calibration: tokens [B, H, N, D] that constants are fitted to; ``x`` if None.

    Raises:
        OptionError: it is nothing that quantises, or ``x`` does not fit it.
    """
    data = torch.nan_to_num(x if calibration is None else calibration, 0.0, 0.0, 0.0)
    if isinstance(codec, Recipe):
        found = [_block(f"{codec.name}, {kind}s", part, data) for kind, part, _ in codec.kinds()]
    elif isinstance(codec, Codec):
        found = [_block(str(codec), codec, data)]
    elif isinstance(codec, CodecSpec):
        found = [Subject(*parts) for parts in native_halves(codec, data)]
    elif isinstance(codec, Quantiser):
        tokens = int(getattr(codec, "tokens", 1))
        found = [Subject(type(codec).__name__, codec.encode, codec.decode, tokens)]
    elif callable(codec):
        found = [Subject(getattr(codec, "__name__", str(codec)), codec, lambda code: code)]
    else:
        raise OptionError(
            f"cannot test a {type(codec).__name__}",
            why="it has no encode and decode, and is no function",
            do="Pass a codec block, a Recipe, a CodecSpec, an object with encode(x) and "
            "decode(code), or a function of tokens [B, H, N, D].",
        )
    for subject in found:
        if x.ndim != 4 or x.shape[2] % subject.tokens:
            raise OptionError(
                f"tokens of shape {tuple(x.shape)} for {subject.name}",
                why=f"it takes [B, H, N, D] and codes {subject.tokens} tokens at a time",
                do=f"Pass a multiple of {subject.tokens} tokens.",
            )
    return found


def code_tensors(code: Code) -> Iterator[Tensor]:
    """Every tensor of a code, in order."""
    if isinstance(code, Tensor):
        yield code
    elif dataclasses.is_dataclass(code):
        for f in dataclasses.fields(code):
            yield from code_tensors(getattr(code, f.name))
    elif isinstance(code, Mapping):
        for value in code.values():
            yield from code_tensors(value)
    elif isinstance(code, Sequence) and not isinstance(code, str):
        for value in code:
            yield from code_tensors(value)


def code_bytes(code: Code) -> int:
    """Bytes that a code stores."""
    return sum(t.numel() * t.element_size() for t in code_tensors(code))


def _block(name: str, codec: Codec, calibration: Tensor) -> Subject:
    tokens = codec.tokens
    constants = codec.fit(Sample(calibration.float().transpose(0, 1).flatten(1, 2)))
    dim = calibration.shape[-1]

    def encode(x: Tensor) -> Tensor:
        return codec.encode_bytes(x.float().unflatten(2, (-1, tokens)), constants)

    def decode(code: Tensor) -> Tensor:
        return codec.decode_bytes(code, constants, tokens, dim).flatten(2, 3)

    def bound(x: Tensor) -> Tensor | None:
        found = codec.error_bound(x.float().unflatten(2, (-1, tokens)), constants)
        return None if found is None else found.flatten(2, 3)

    def declared(dim: int) -> float:
        return 8 * codec.unit_bytes(tokens, dim) / (tokens * dim)

    return Subject(name, encode, decode, tokens, bound, declared)
