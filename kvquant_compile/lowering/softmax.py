"""A softmax-weighted sum that is built block by block, with its log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


class OnlineSoftmax:
    """Running maximum, normaliser and weighted sum of every query.

    Args:
        queries: shape of the queries [B, H, G, S] (kv heads, queries per kv head, steps).
        width: channels of the values.
        device: where to accumulate, in float32.
    """

    def __init__(self, queries: torch.Size, width: int, device: torch.device) -> None:
        self.peak = torch.full(queries, -torch.inf, device=device)
        self.mass = torch.zeros(queries, device=device)
        self.total = torch.zeros(*queries, width, device=device)

    def update(self, tile: slice, scores: Tensor, values: Tensor) -> None:
        """Add keys: scores [B, H, G, s, N] (-inf where hidden) and values [B, H, N, D]."""
        before = self.peak[..., tile]
        peak = torch.maximum(before, scores.amax(-1))
        # A query that has seen nothing yet keeps -inf; shifting it by 0 avoids inf - inf.
        shift = torch.where(peak == -torch.inf, 0.0, peak)
        weights = (scores - shift[..., None]).exp_()
        decay = (before - shift).exp_()
        self.peak[..., tile] = peak
        self.mass[..., tile] = self.mass[..., tile] * decay + weights.sum(-1)
        product = (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])
        self.total[..., tile, :] = self.total[..., tile, :] * decay[..., None] + product

    def merge(self, tile: slice, output: Tensor, lse: Tensor) -> None:
        """Add finished softmaxes: outputs [B, H, G, s, D] and log-sum-exps [B, H, G, s]."""
        before = self.peak[..., tile]
        peak = torch.maximum(before, lse)
        shift = torch.where(peak == -torch.inf, 0.0, peak)
        decay, weight = (before - shift).exp(), (lse - shift).exp()
        self.peak[..., tile] = peak
        self.mass[..., tile] = self.mass[..., tile] * decay + weight
        total = self.total[..., tile, :]
        total.mul_(decay[..., None]).addcmul_(output.float(), weight[..., None])

    def result(self, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs [B, H, G, S, D] and log-sum-exps [B, H, G, S]; zeros where nothing was seen.

        Args:
            sink_logits: logits [Hq], or of every query [B, Hq, S, 1], that take part in the
                softmax with no value.
        """
        mass, peak = self.mass, self.peak
        shift = torch.where(peak == -torch.inf, 0.0, peak)
        if sink_logits is not None:
            shape = (1, *mass.shape[1:3], 1) if sink_logits.ndim == 1 else mass.shape
            logit = sink_logits.float().reshape(shape)
            mass = mass + (logit - shift).exp()
        output = self.total / torch.where(mass > 0, mass, 1.0)[..., None]
        return output, shift + mass.log()
