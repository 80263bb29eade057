"""Which implementation an op runs: generated kernels where they apply, torch elsewhere."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.codec.formats import Layout, parse_layout
from kvquant_compile.lowering.triton.compat import interpreting, unavailable
from kvquant_compile.lowering.triton.spec import unsupported

SWITCH = "KVQUANT_KERNELS"


def refusal(layout: Layout, device: torch.device) -> str:
    """Why the torch path runs; empty where the generated kernels do."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"no kernels for {device.type}"
    return unavailable() or unsupported(layout) or ("" if interpreting() else _not_chosen())


def _not_chosen() -> str:
    """The kernels as they are now have been interpreted and simulated, not yet run on a GPU."""
    if os.environ.get(SWITCH) == "triton":
        return ""
    return f"the generated kernels are experimental; {SWITCH}=triton in the environment runs them"


def kernel_name(layout: Layout, device: torch.device) -> str:
    """What runs a layer's ops, for reports."""
    reason = refusal(layout, device)
    if device.type == "cpu" and not interpreting():
        return "torch (CPU)"
    if reason:
        return f"torch ({device.type}): {reason}"
    return f"triton portable ({_architecture(device)})"


def use_kernels(x: Tensor, format: str) -> bool:
    """Whether the ops on ``x`` run generated kernels; warns once a format on a GPU that not."""
    layout = parse_layout(format)
    reason = refusal(layout, x.device)
    if reason and x.device.type == "cuda" and not layout.lossless:
        _warn(format, reason)
    return not reason


def append(*arguments: Any) -> None:
    """The kernels' append; arguments as in :mod:`kvquant_compile.lowering.ops`."""
    from kvquant_compile.lowering.triton.append import append as run

    run(*arguments)


def attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The kernels' attend; arguments as of :func:`kvquant_compile.lowering.attend.attend`."""
    from kvquant_compile.lowering.triton.attend import attend as run

    return run(*arguments)


@functools.cache
def _warn(format: str, reason: str) -> None:
    warnings.warn(
        f"pages of format {format!r} are read and written by the torch path, which waits for the"
        f" device at every step: {reason}",
        stacklevel=2,
    )


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
