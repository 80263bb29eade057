"""The private torch ops the lowering uses; tested with torch 2.11 and 2.13."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend


def causal_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Causal attention of a chunk over itself, with its log-sum-exp, by torch's flash kernels.

    Public ``scaled_dot_product_attention`` runs the same kernel but keeps the log-sum-exp.

    Args:
        query: [B, Hq, S, D].
        key, value: [B, H, S, D], Hq a multiple of H.
        scale: of the scores.

    Returns:
        (output [B, Hq, S, D], log-sum-exp [B, Hq, S] float32), or None where the kernel cannot
        serve: another device, unequal widths, or a torch without it.
    """
    if query.device.type != "cpu":
        return device_flash(query, key, value.to(query.dtype), scale, causal=True)
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if kernel is None or key.shape[-1] != value.shape[-1]:
        return None
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    output, lse = kernel(query, key, value.to(query.dtype), 0.0, True, scale=scale)
    return output, lse.float()


def whole_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Attention of every query to all keys on a CPU, with its log-sum-exp, by torch's flash kernel.

    Args:
        query: [B, H, G, S, D], G query heads of every kv head.
        key, value: [B, H, N, D] of the query's dtype.
        scale: of the scores.

    Returns:
        (output [B, H, G, S, D], log-sum-exp [B, H, G, S] float32), or None where the kernel
        cannot serve: another device, unequal widths, or a torch without it.
    """
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if kernel is None or query.device.type != "cpu" or key.shape[-1] != value.shape[-1]:
        return None
    groups = query.shape[2:4]
    # The kernel takes channels for neighbours and does not look.
    rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (query.flatten(2, 3), key, value))
    output, lse = kernel(*rows, 0.0, False, scale=scale)
    return output.unflatten(2, groups), lse.float().unflatten(2, groups)


def device_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    new_shape: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Attention on a GPU by the kernel that ``scaled_dot_product_attention`` would choose, with
    its log-sum-exp.

    Args:
        query: [B, Hq, S, D].
        key, value: [B, H, N, D] of the same dtype, Hq a multiple of H.
        scale: of the scores.
        causal: query i sees keys 0 .. i; else all of them.
        new_shape: these lengths may never come again; rather not cuDNN, which prepares a plan for
            every new shape.

    Returns:
        (output [B, Hq, S, D], natural log-sum-exp [B, Hq, S] float32, contiguous), or None where
        torch would choose no flash kernel (dtype, widths) or the device is no GPU.
    """
    if not query.is_cuda or not query.dtype == key.dtype == value.dtype:
        return None
    grouped = query.shape[1] != key.shape[1]
    choice = torch._fused_sdp_choice(
        query, key, value, None, 0.0, causal, scale=scale, enable_gqa=grouped
    )
    flash_fits = key.shape[-1] == value.shape[-1] and key.shape[-1] % 8 == 0
    cudnn = choice == SDPBackend.CUDNN_ATTENTION.value
    if cudnn and not (new_shape and flash_fits):
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
    elif flash_fits and (cudnn or choice == SDPBackend.FLASH_ATTENTION.value):
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
    else:
        return None
    return output, lse.reshape(query.shape[:3]).contiguous()
