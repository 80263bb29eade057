"""Assertions about what is stored: how much, always the same, in any order, and read at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvquant_compile.codec.algebra import Recipe
from kvquant_compile.testing.stream import Stored, streamed
from kvquant_compile.testing.subject import (
    Code,
    Subject,
    Testable,
    code_bytes,
    code_tensors,
    subjects,
)

SLICES = 16


def assert_effective_bits(
    codec: Testable,
    x: Tensor,
    expected: float | None = None,
    *,
    tolerance: float = 1e-9,
    calibration: Tensor | None = None,
) -> None:
    """The bytes that are stored are the ones that are claimed.

    Args:
        codec, x, calibration: as of :func:`~.numerics.assert_roundtrip`.
        expected: bits per element, everything counted; None for what the codec itself declares.
        tolerance: in bits.

    Raises:
        AssertionError: they are not, or nothing is claimed.
    """
    for subject in subjects(codec, x, calibration):
        claimed = subject.declared(x.shape[-1]) if expected is None else expected
        if claimed is None:
            raise AssertionError(f"{subject.name} declares no effective bits; pass them")
        measured = 8 * code_bytes(subject.encode(x)) / x.numel()
        if not abs(measured - claimed) <= tolerance:
            raise AssertionError(
                f"{subject.name}: stores {measured:.4f} bits per element, not {claimed:.4f}"
            )


def assert_deterministic(codec: Testable, x: Tensor, *, calibration: Tensor | None = None) -> None:
    """The same tokens give the same bits: again, in another memory layout, and alone in a batch.

    Args:
        codec, x, calibration: as of :func:`~.numerics.assert_roundtrip`.

    Raises:
        AssertionError: they do not.
    """
    for subject in subjects(codec, x, calibration):
        code = subject.encode(x)
        _same_code(subject, "a second time", code, subject.encode(x.clone()))
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        _same_code(subject, "from a transposed tensor", code, subject.encode(strided))
        whole = subject.decode(code)
        for row in range(x.shape[0]):
            alone = subject.trip(x[row : row + 1])
            if not _equal(whole[row : row + 1], alone):
                raise AssertionError(f"{subject.name}: sequence {row} differs alone in its batch")


def assert_append_order_invariant(
    codec: Testable,
    x: Tensor,
    splits: Sequence[int] | None = None,
    *,
    calibration: Tensor | None = None,
) -> None:
    """Tokens that come in pieces are stored with the same bits as all at once.

    A :class:`~kvquant_compile.recipes.Recipe` is driven through a real paged cache, its exact tail
    included, and any pieces will do. Of others, pieces must hold whole units of ``tokens``.

    Args:
        codec, x, calibration: as of :func:`~.numerics.assert_roundtrip`.
        splits: tokens of every piece, adding up to those of ``x``; one unit at a time if None.

    Raises:
        AssertionError: the bits differ.
    """
    count = x.shape[2]
    if isinstance(codec, Recipe):
        pieces = list(splits or [1] * count)
        whole = streamed(codec, x, [count], calibration)
        split = streamed(codec, x, pieces, calibration)
        for name, a, b in zip(Stored.names, whole.tensors, split.tensors, strict=True):
            if not _equal(a, b):
                raise AssertionError(f"{codec.name}: {name} depend on how the tokens came")
        return
    for subject in subjects(codec, x, calibration):
        pieces = list(splits or [subject.tokens] * (count // subject.tokens))
        if sum(pieces) != count or any(piece % subject.tokens for piece in pieces):
            raise ValueError(f"{pieces} are no pieces of {count} in units of {subject.tokens}")
        parts = torch.cat([subject.trip(part) for part in x.split(pieces, 2)], 2)
        if not _equal(subject.trip(x), parts):
            raise AssertionError(f"{subject.name}: tokens depend on how they came")


def assert_bytes_matter(codec: Testable, x: Tensor, *, calibration: Tensor | None = None) -> None:
    """What is read is what was stored: spoiling any part of it changes the tokens (or makes
    decode refuse it), and tokens do not come back exactly.

    A recipe that silently gave the original back would pass every accuracy test.

    Args:
        codec, x, calibration: as of :func:`~.numerics.assert_roundtrip`.

    Raises:
        AssertionError: the tokens come back exactly, or spoilt bytes are not noticed.
    """
    for subject in subjects(codec, x, calibration):
        code = subject.encode(x)
        clean = subject.decode(code)
        if _equal(clean, x.to(clean.dtype)):
            raise AssertionError(f"{subject.name}: tokens come back exactly; nothing is quantised")
        for i, tensor in enumerate(code_tensors(code)):
            for part in _slices(tensor):
                kept = tensor[..., part].clone()
                tensor[..., part] = _spoilt(kept)
                changed = _changed(subject, code, clean)
                tensor[..., part] = kept
                if not changed:
                    where = f"[..., {part.start}:{part.stop}] of stored tensor {i}"
                    raise AssertionError(f"{subject.name}: {where} is never read")


def _changed(subject: Subject, code: Code, clean: Tensor) -> bool:
    try:
        return not _equal(subject.decode(code), clean)
    except (IndexError, RuntimeError, ValueError):
        return True


def _slices(tensor: Tensor) -> list[slice]:
    """The last dimension in at most ``SLICES`` parts."""
    size = tensor.shape[-1]
    step = max(1, -(-size // SLICES))
    return [slice(start, min(size, start + step)) for start in range(0, size, step)]


def _spoilt(x: Tensor) -> Tensor:
    """Some bits of every byte turned over."""
    return (x.contiguous().view(torch.uint8) ^ 0x5A).view(x.dtype)


def _same_code(subject: Subject, what: str, a: Code, b: Code) -> None:
    first, second = list(code_tensors(a)), list(code_tensors(b))
    same = len(first) == len(second) and all(map(_equal, first, second))
    if not same:
        raise AssertionError(f"{subject.name}: encodes the same tokens otherwise {what}")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
