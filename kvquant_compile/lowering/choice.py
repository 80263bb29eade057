"""What runs a layer's ops on a device, for reports: kernels of some back end, or torch, and why."""

from __future__ import annotations

import torch

from kvquant_compile.codec.formats import Layout
from kvquant_compile.lowering.cpp import dispatch as cpp
from kvquant_compile.lowering.triton import dispatch
from kvquant_compile.lowering.triton.compat import interpreting


def refusal(layout: Layout, device: torch.device) -> str:
    """Why the torch path attends to a layer; empty where generated kernels do."""
    if device.type == "cpu" and not interpreting():
        return cpp.refusal(layout)
    return dispatch.refusal(layout, device)


def kernel_name(layout: Layout, device: torch.device, *, bias_or_chunks: bool = False) -> str:
    """What attends to a layer; no kernel has position biases or chunks."""
    if device.type == "cpu" and not interpreting():
        return cpp.kernel_name(layout, bias_or_chunks=bias_or_chunks)
    return dispatch.kernel_name(layout, device, bias_or_chunks=bias_or_chunks)
