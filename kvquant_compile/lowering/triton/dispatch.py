"""Which implementation an op runs: generated kernels where they apply, torch elsewhere."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.codec.formats import Layout, parse_layout
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.errors import OptionError
from kvquant_compile.lowering.triton.compat import interpreting, unavailable
from kvquant_compile.lowering.triton.spec import unsupported

SWITCH = "KVQUANT_KERNELS"
CHOICES = ("auto", "ampere", "portable", "torch")


def refusal(layout: Layout, device: torch.device) -> str:
    """Why the torch path runs; empty where the generated kernels do."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"no kernels for {device.type}"
    asked = f"{SWITCH}=torch in the environment" if choice() == "torch" else ""
    return asked or unavailable() or unsupported(layout)


def choice() -> str:
    """What the environment asks for: "auto", "ampere" (on newer GPUs too, the kernels that older
    ones run), "portable" (no back end for one vendor) or "torch" (no kernels).

    Raises:
        OptionError: anything else.
    """
    chosen = os.environ.get(SWITCH, "auto")
    if chosen not in CHOICES:
        raise OptionError(
            f"{SWITCH}={chosen} in the environment",
            why=f"it takes {', '.join(CHOICES)}",
            do="Unset it to let every device run its fastest kernels.",
        )
    return chosen


def kernel_name(layout: Layout, device: torch.device, *, bias_or_chunks: bool = False) -> str:
    """What attends to a layer, for reports; no kernel has position biases or chunks."""
    reason = refusal(layout, device)
    if bias_or_chunks:
        reason = reason or "no kernels for position biases, chunks and chosen keys"
    if device.type == "cpu" and not interpreting():
        return "torch (CPU)"
    if reason:
        return f"torch ({device.type}): {reason}"
    back_end = "gluon" if use_gluon(layout, device) else "triton portable"
    return f"{back_end} ({_architecture(device)})"


def use_gluon(layout: Layout, device: torch.device) -> bool:
    """Whether decode steps run the back end for NVIDIA Ampere and later."""
    from kvquant_compile.lowering.gluon import launch

    return (
        choice() in ("auto", "ampere")
        and isinstance(layout, PageLayout)
        and launch.applies(layout, device)
    )


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
