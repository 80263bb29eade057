"""What a mask means, found by evaluating it: causal, causal within a sliding window, or other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.capture.reference import CAUSAL, CHUNKED, SLIDING

# The farthest query that is asked for its window; wider windows count as none, since no context
# of that length is stored by these models.
FARTHEST = 1 << 20
_SAMPLES = 4096
LOOKS_AHEAD = "a query sees keys after it"


@dataclass(frozen=True)
class MaskKind:
    """``causal``, ``sliding`` with its window, ``chunked`` with the length of its chunks in
    ``window``, or ``other`` with the first disagreement."""

    kind: str
    window: int = 0
    reason: str = ""

    @property
    def looks_ahead(self) -> bool:
        """Whether queries see later keys: the model is an encoder."""
        return self.reason == LOOKS_AHEAD

    @property
    def understood(self) -> bool:
        """Whether the mask is one that a cache can serve."""
        return self.kind in (CAUSAL, SLIDING, CHUNKED)


def mask_kind(visible: Callable[[Tensor, Tensor], Tensor]) -> MaskKind:
    """Classify a mask given as a predicate on positions.

    Args:
        visible: maps query and key positions (int64 tensors [N]) to bool [N].

    The window is what the farthest query sees; the answer then has to hold for thousands of
    sampled pairs, near and far, or the mask is ``other``.
    """
    keys = torch.arange(FARTHEST + 2)
    try:
        row = visible(torch.full_like(keys, FARTHEST), keys)
    except (IndexError, RuntimeError):  # it reads a table of the tokens at hand
        return MaskKind("other", reason="it depends on more than the two positions")
    seen = int(row.sum())
    window = 0 if seen == FARTHEST + 1 else seen
    if bool(row[-1]):
        return MaskKind("other", reason=LOOKS_AHEAD)
    if seen == 0:
        return MaskKind("other", reason=f"query {FARTHEST} sees no key")
    query, key = _sample_pairs(seen)
    wrong = visible(query, key) != _expected(query, key, window)
    if bool(wrong.any()):
        chunk = _chunk(visible)
        queries, keys = torch.cat([query, query]), torch.cat([key, query - key % 97])
        if chunk and torch.equal(visible(queries, keys), _in_chunk(queries, keys, chunk)):
            return MaskKind(CHUNKED, chunk)
        i = int(wrong.nonzero()[0])
        return MaskKind("other", reason=f"query {int(query[i])} and key {int(key[i])} disagree")
    return MaskKind(SLIDING, window) if window else MaskKind(CAUSAL)


def _expected(query: Tensor, key: Tensor, window: int) -> Tensor:
    seen = key <= query
    return seen & (key > query - window) if window else seen


def _chunk(visible: Callable[[Tensor, Tensor], Tensor]) -> int:
    """How many queries see the very first key, if these are the first ones; else 0."""
    queries = torch.arange(FARTHEST)
    seen = visible(queries, torch.zeros_like(queries))
    count = int(seen.sum())
    return count if bool(seen[:count].all()) and count < FARTHEST else 0


def _in_chunk(query: Tensor, key: Tensor, chunk: int) -> Tensor:
    same = query.div(chunk, rounding_mode="floor") == key.div(chunk, rounding_mode="floor")
    return (key <= query) & same


def _sample_pairs(seen: int) -> tuple[Tensor, Tensor]:
    """All pairs among the first positions, random pairs, and pairs at the window's edge."""
    generator = torch.Generator().manual_seed(0)
    near = torch.cartesian_prod(torch.arange(80), torch.arange(80))
    query = torch.randint(0, FARTHEST, (_SAMPLES,), generator=generator)
    far = torch.stack([query, (query * torch.rand(_SAMPLES, generator=generator)).long()], 1)
    edges = [torch.stack([query, (query - seen + d).clamp(min=0)], 1) for d in (-1, 0, 1, 2)]
    diagonal = [torch.stack([query, query + d], 1) for d in (0, 1)]
    return torch.cat([near, far, *edges, *diagonal]).unbind(1)  # type: ignore[return-value]
