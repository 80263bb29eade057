"""What a cache refuses, and why: checks that change nothing."""

from __future__ import annotations

from torch import Tensor

from kvquant_compile.errors import CacheError


def check_alive(broken: str) -> None:
    """Raise if a cache was left half changed; ``broken`` says by what, or is empty.

    Raises:
        CacheError: it was.
    """
    if broken:
        raise CacheError(
            "this cache can no longer be used",
            why=f"{broken} failed half way, and part of it had happened",
            do="Start from a new cache, call reset() on this one, or go on from a copy.",
        )


def check_room(columns: int, most: int | None) -> None:
    """Raise if a model has no positions for so many ``columns``; ``most`` None: it has any.

    Raises:
        CacheError: it has none.
    """
    if most is not None and columns > most:
        raise CacheError(
            f"{columns} tokens are more than the model has positions for",
            why=f"its tables of positions end after {most}",
            do="Stop there, or give the model longer ones.",
        )


def check_batch(batch: int, cached: int) -> None:
    """Raise if a step of ``batch`` sequences does not continue ``cached`` ones.

    Raises:
        CacheError: it does not.
    """
    if batch != cached:
        raise CacheError(
            f"a batch of {batch} does not continue this cache",
            why=f"it holds {cached} sequences",
            do="Use one cache per batch, or batch_repeat_interleave / batch_select_indices.",
        )


def check_mask(mask: Tensor, batch: int, columns: int, steps: int) -> None:
    """Raise if a mask is not [batch, columns + steps], over cached and new tokens.

    Raises:
        CacheError: it is not.
    """
    if mask.shape != (batch, columns + steps):
        raise CacheError(
            f"an attention mask of shape {tuple(mask.shape)} does not fit",
            why=f"{columns} cached and {steps} new tokens in {batch} sequences need "
            f"({batch}, {columns + steps})",
            do="Pass a 2-D mask over cached and new tokens, or none.",
        )


def check_crop(tokens_to_remove: int, columns: int, recurrent: bool) -> None:
    """Raise if ``columns`` cached tokens cannot be cropped so.

    Raises:
        CacheError: the number is positive, or more than is cached, or a recurrent state cannot
            go back.
    """
    if not 0 <= -tokens_to_remove <= columns:
        raise CacheError(
            f"cannot crop by {tokens_to_remove}",
            why=f"{columns} tokens are cached, and crop takes minus the number to drop",
            do="Pass a number between -length and 0.",
        )
    if tokens_to_remove and recurrent:
        raise CacheError(
            f"cannot crop by {tokens_to_remove}",
            why="layers of the model keep a recurrent state or an index, which cannot go back",
            do="Start again from an empty cache.",
        )


def check_fork(count: int) -> None:
    """Raise if a cache cannot be forked ``count`` times.

    Raises:
        CacheError: the number is not positive.
    """
    if count < 1:
        raise CacheError(
            f"cannot fork a cache {count} times",
            why="a cache without sequences holds nothing",
            do="Pass the number of continuations, 1 or more.",
        )
