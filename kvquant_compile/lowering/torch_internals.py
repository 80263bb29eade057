"""The one private torch op the lowering uses; tested with torch 2.11 and 2.13."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Causal attention of a chunk over itself, with its log-sum-exp, by torch's CPU flash kernel.

    Public ``scaled_dot_product_attention`` runs the same kernel but keeps the log-sum-exp.

    Args:
        query: [B, Hq, S, D].
        key, value: [B, H, S, D], Hq a multiple of H.
        scale: of the scores.

    Returns:
        (output [B, Hq, S, D], log-sum-exp [B, Hq, S] float32), or None where the kernel cannot
        serve: another device, unequal widths, or a torch without it.
    """
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if kernel is None or query.device.type != "cpu" or key.shape[-1] != value.shape[-1]:
        return None
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    output, lse = kernel(query, key, value.to(query.dtype), 0.0, True, scale=scale)
    return output, lse.float()
