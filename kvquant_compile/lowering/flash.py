"""Attention by torch's own flash kernels where masks are trivial, for the torch path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvquant_compile.lowering.softmax import OnlineSoftmax
from kvquant_compile.lowering.torch_internals import causal_flash, whole_flash

if TYPE_CHECKING:
    from kvquant_compile.lowering.attend import Site

TILE = 4096
"""Queries that read a block at a time: results are copied a few times before they are merged."""

PREFILL_STEPS = 16
"""Steps of more tokens read the history by a flash kernel."""


def history_by_flash(
    state: OnlineSoftmax,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    site: Site,
) -> bool:
    """Merge a block that all queries see whole, by torch's flash kernel in the query's dtype.

    Args:
        query: [B, H, G, S, 2 P] in pair order, unscaled.

    Returns:
        Whether it could: not where a site does more to scores than scale them.
    """
    steps, plain = query.shape[3], not site.softcap and not site.biased
    if steps <= PREFILL_STEPS or not plain:
        return False
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    for start in range(0, steps, TILE):
        tile = slice(start, min(steps, start + TILE))
        found = whole_flash(query[..., tile, :], keys, values, site.scale)
        if found is None:
            return False
        state.merge(tile, *found)
    return True


def own_by_flash(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, site: Site
) -> tuple[Tensor, Tensor] | None:
    """The step's own tokens by torch's flash kernel, the very one the original model runs.

    Returns:
        output [B, Hq, S, D] and log-sum-exp [B, Hq, S]; None where it cannot: it does plain causal
        attention of several tokens, none of them padding.
    """
    special = site.biased or site.selected is not None
    plain = not (site.softcap or site.window or site.chunk or special)
    if slots.shape[1] == 1 or not plain or not bool((slots >= 0).all()):
        return None
    return causal_flash(query, key, value, site.scale)
