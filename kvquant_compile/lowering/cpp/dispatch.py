"""Whether the ops on a CPU run generated C++, and why not where they do not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.codec.formats import Layout, parse_layout
from kvquant_compile.lowering.cpp.build import CompilationError, toolchain_failure
from kvquant_compile.lowering.cpp.spec import unsupported
from kvquant_compile.lowering.triton.compat import interpreting
from kvquant_compile.lowering.triton.dispatch import SWITCH, choice

DECODE_STEPS = 16
"""Steps of more tokens are prefill and run as torch: matrix products there pay for unpacking."""

Attend = Callable[..., tuple[Tensor, Tensor]]
Append = Callable[..., None]


def refusal(layout: Layout) -> str:
    """Why decode steps on a CPU run as torch; empty where they run a compiled kernel."""
    if interpreting():
        return "kernels run in Triton's interpreter"
    if choice() == "torch":
        return f"{SWITCH}=torch in the environment"
    if reason := unsupported(layout):
        return reason
    return toolchain_failure()


def kernel_name(layout: Layout, *, bias_or_chunks: bool = False) -> str:
    """What attends to a layer on a CPU, for reports."""
    reason = refusal(layout)
    if bias_or_chunks:
        reason = reason or "no kernels for position biases, chunks and chosen keys"
    if reason:
        return f"torch (CPU): {reason}"
    return f"C++ ({_target()}), prefill torch"


def attend_implementation(query: Tensor, format: str) -> Attend | None:
    """The compiled attention for a step's queries; None where torch runs.

    Warns once where only a compiler is missing, or fails.
    """
    return _attend if _serves(query, format) else None


def append_implementation(key: Tensor, format: str) -> Append | None:
    """The compiled append for a step's keys; None where torch runs."""
    return _append if _serves(key, format) else None


def _serves(x: Tensor, format: str) -> bool:
    """Whether compiled kernels take a step of [B, heads, S, dim]."""
    if x.device.type != "cpu" or x.shape[2] > DECODE_STEPS or x.dtype == torch.float64:
        return False
    layout = parse_layout(format)
    reason = refusal(layout)
    if reason and not (unsupported(layout) or choice() == "torch" or interpreting()):
        _warn(reason)
    return not reason


def _attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The compiled attention, or torch where this very kernel cannot be compiled."""
    from kvquant_compile.lowering.attend import attend as torch_attend
    from kvquant_compile.lowering.cpp.launch import attend

    run: Attend = attend
    try:
        return run(*arguments, native=choice() != "portable")
    except CompilationError as error:
        _warn(str(error))
        return torch_attend(*arguments)


def _append(*arguments: Any) -> None:
    """The compiled append, or torch where this very kernel cannot be compiled."""
    from kvquant_compile.lowering.append import append as torch_append
    from kvquant_compile.lowering.cpp.append import append

    run: Append = append
    try:
        run(*arguments, native=choice() != "portable")
    except CompilationError as error:
        _warn(str(error))
        torch_append(*arguments)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"decode steps on this CPU run as plain torch, several times slower: {reason}",
        stacklevel=2,
    )


@functools.cache
def _target() -> str:
    found = torch.backends.cpu.get_cpu_capability().lower()
    return found if choice() != "portable" else "portable"
