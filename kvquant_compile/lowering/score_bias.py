"""What is added to scores by the distance of their tokens, for the torch path."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvquant_compile.lowering.attend import Site

# Tile of queries -> what is added to their scores, float32 [B, H, G, s, N].
Bias = Callable[[slice], Tensor]


def score_bias(site: Site, slots: Tensor, places: Tensor, groups: tuple[int, int]) -> Bias | None:
    """The position bias of an attention, made tile by tile; None where it has none.

    Args:
        site: of the attention.
        slots: of the queries, [B, S].
        places: slots of the keys, [B or 1, N].
        groups: kv heads, queries per kv head.
    """

    def added(tile: slice) -> Tensor:
        distance = (slots[:, tile, None] - places[:, None, :])[:, None, None]
        if site.distance_logits is None:
            assert site.slopes is not None
            return site.slopes.view(1, *groups, 1, 1) * -distance
        return by_distance(site.distance_logits[:, :, tile].unflatten(1, groups), distance)

    return added if site.biased else None


def by_distance(logits: Tensor, distance: Tensor) -> Tensor:
    """Logits [B, H, G, S, extent] at distances [B, 1, 1, S, N], 0 beyond their extent; float32."""
    extent = logits.shape[-1]
    near = (distance >= 0) & (distance < extent)
    index = torch.where(near, distance, 0).long()
    return torch.where(near, logits.gather(-1, index.expand(*logits.shape[:-1], -1)).float(), 0.0)
