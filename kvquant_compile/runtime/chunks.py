"""Long steps, run as several shorter ones: work space for one chunk, whatever a prompt's length.

A chunk attends to its own tokens as a step does, and to the chunks before it through the packed
cache, as everything after them will.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvquant_compile.errors import OptionError
from kvquant_compile.runtime.cache import QuantizedCache

PREFILL_CHUNK = 32768
"""Default length of a chunk in tokens of a sequence; a longer step's intermediate results outgrow
its cache."""


def check_chunk(chunk: int | None) -> None:
    """Raise if ``chunk`` is neither a length nor None, for steps that are never cut.

    Raises:
        OptionError: it is neither.
    """
    whole = isinstance(chunk, int) and not isinstance(chunk, bool)
    if chunk is not None and not (whole and chunk > 0):
        raise OptionError(
            f"prefill_chunk={chunk!r}",
            why="it is the number of tokens that a step may have",
            do="Pass a positive whole number, or None for no limit.",
        )


def in_chunks(
    run: Callable[[slice], Tensor], steps: int, chunk: int | None, cache: QuantizedCache
) -> Tensor:
    """A step's output, [B, S, ...], from parts of at most ``chunk`` tokens.

    Models with a recurrent state are not cut: many go on from one by single tokens only.

    Args:
        run: what caches and computes the tokens of a span.
        steps: tokens of every sequence.
        chunk: most tokens of a part; None for no limit.
        cache: what the step goes into; as before if a part fails.
    """
    if chunk is None or steps <= chunk or cache.states is not None:
        return run(slice(0, steps))
    before = cache.columns
    try:
        first = run(slice(0, chunk))
        output = first.new_empty(first.shape[0], steps, *first.shape[2:])
        output[:, :chunk] = first
        for start in range(chunk, steps, chunk):
            span = slice(start, min(steps, start + chunk))
            output[:, span] = run(span)
    except BaseException:
        cache.crop(before - cache.columns)
        raise
    return output
