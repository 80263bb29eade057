"""The plain meaning of the marker ops: exact masks and exact attention, in differentiable torch.

Everything here is the definition against which rewritten graphs are compared; nothing is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CAUSAL = "causal"
SLIDING = "sliding"
CHUNKED = "chunked"


def visible_keys(queries: int, past: int, window: int, device: torch.device | str) -> Tensor:
    """Which keys each query sees: bool [queries, past + queries]; ``window`` 0 means no window.

    Query i stands at position ``past + i``; key j is visible iff ``j <= past + i`` and, with a
    window, ``j > past + i - window``.
    """
    query = torch.arange(past, past + queries, device=device)[:, None]
    key = torch.arange(past + queries, device=device)[None, :]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def step_mask(
    padding: Tensor | None,
    batch: int,
    queries: int,
    past: int,
    kind: str,
    window: int,
    device: torch.device,
) -> Tensor:
    """What the mask marker stands for (:mod:`.markers`), as :func:`exact_mask` has it."""
    chunked = kind == CHUNKED
    return exact_mask(padding, batch, queries, past, window, device, chunked=chunked)


def exact_mask(
    padding: Tensor | None,
    batch: int,
    queries: int,
    past: int,
    window: int,
    device: torch.device,
    *,
    chunked: bool = False,
) -> Tensor:
    """The bool mask [batch, 1, queries, past + queries]; True where a key is attended.

    Args:
        padding: [batch, past + queries], nonzero for real tokens; None when none is padded.
        batch, queries, past: sizes; ``past`` counts the cached tokens.
        window: sliding window, 0 for none.
        device: where the mask is made.
        chunked: ``window`` is the length of chunks instead: a query sees its own chunk only.
            Chunks are counted from the first real token of a sequence.
    """
    seen = visible_keys(queries, past, 0 if chunked else window, device)
    seen = seen[None, None].expand(batch, 1, -1, -1)
    real = None if padding is None else padding.bool()[:, : past + queries]
    if chunked:
        places = torch.arange(past + queries, device=device).expand(batch, -1)
        ranks = places if real is None else real.cumsum(1) - 1
        chunk = ranks.div(window, rounding_mode="floor")
        seen = seen & (chunk[:, None, None] == chunk[:, None, past:, None])
    return seen if real is None else seen & real[:, None, None]


def chosen_keys(selected: Tensor, keys: int) -> Tensor:
    """Which keys each query has chosen, bool [B, S, keys].

    Args:
        selected: their places, int [B, S, n], negative ones being none; or a mask over the first
            keys, bool [B, 1, S, n].
        keys: how many there are.
    """
    if selected.dtype is torch.bool:
        return F.pad(selected[:, 0], (0, keys - selected.shape[-1]))
    batch, queries, _ = selected.shape
    chosen = torch.zeros(batch, queries, keys + 1, dtype=torch.bool, device=selected.device)
    places = torch.where(selected < 0, keys, selected).long()
    return chosen.scatter(2, places, torch.ones_like(places, dtype=torch.bool))[..., :keys]


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention as the model defines it, differentiable in q, k, v and sinks.

    Args:
        q: [B, Hq, S, D]; Hq a multiple of Hkv.
        k, v: [B, Hkv, T, D] and [B, Hkv, T, Dv].
        mask: bool [B or 1, 1 or Hq, S, T], True where attended; None attends to everything.
        sinks: logits that join each softmax without a value, [Hq] or, one for every query,
            [B, Hq, S, 1]; or None.
        scaling: factor of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        slopes: [Hq]; ``slope * (j - i)`` joins the score of query i and key j (ALiBi, arXiv
            2108.12409), both counted from the first key, the last query being the last key.
        bias: [B, Hq, S, T], joins the scores, or None.

    Returns:
        [B, S, Hq, Dv] in the dtype of v.
    """
    if mask is not None:
        # A row without any visible key (left padding) would give NaN, which then leaks into
        # other rows through 0 * NaN: let such rows attend to everything, nobody reads them.
        mask = mask | ~mask.any(-1, keepdim=True)
    if sinks is None and not softcap and slopes is None and bias is None:
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    weights = _weights(q, k, mask, sinks, scaling, softcap, slopes, bias).to(v.dtype)
    return (weights @ _repeat_heads(v, q.shape[1])).transpose(1, 2)


def _weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float,
    slopes: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    scores = (q @ _repeat_heads(k, q.shape[1]).transpose(2, 3)).float() * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        places = torch.arange(k.shape[2], device=k.device)
        distance = places - places[k.shape[2] - q.shape[2] :, None]
        scores = scores + slopes.float()[:, None, None] * distance
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return torch.softmax(scores, -1)
    column = sinks.float().reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks.float()
    column = column.expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)
