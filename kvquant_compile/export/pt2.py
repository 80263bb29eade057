"""``export_pt2`` and ``load_pt2``: an optimised model as a torch.export archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvquant_compile.errors import OptionError
from kvquant_compile.export.accepted import exportable
from kvquant_compile.export.codec_steps import run
from kvquant_compile.export.function_ops import FunctionOps
from kvquant_compile.export.native_ops import NativeOps
from kvquant_compile.export.onnx_functions import quiet
from kvquant_compile.export.step import CacheOps, StepModule, stores_of
from kvquant_compile.export.trace import trace_step
from kvquant_compile.runtime.installed import installed

OPS = ("kvquant", "standard")


def export_pt2(model: nn.Module, path: str | Path, *, ops: str = "kvquant") -> Path:
    """Write an optimised model's step as a ``.pt2`` archive.

    The graph is that of :func:`kvquant_compile.export_onnx`: call what :func:`load_pt2` returns
    with ``(input_ids, token_mask, lengths, pages, sinks)``, pages and sinks being lists with one
    tensor per layer; it returns ``(logits, lengths, pages, sinks)``.

    Args:
        model: optimised, float32, on a CPU.
        path: of the archive.
        ops: "kvquant" keeps the two ops, which change pages and sinks in place and run generated
            kernels where there are any; this package must be installed to load it. "standard"
            spells them out in torch's own operators: any torch loads it, and it returns new
            pages.

    Returns:
        ``path``.

    Raises:
        OptionError: the model is not optimised, or cannot be exported; the message says why.
    """
    if ops not in OPS:
        raise OptionError(f"ops={ops!r}", why=f"known are {', '.join(OPS)}", do="Pass one of them.")
    state = exportable(installed(model))
    implementation: CacheOps = NativeOps() if ops == "kvquant" else FunctionOps(run)
    with quiet():
        program = trace_step(StepModule(state, stores_of(state), implementation))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, path)
    return Path(path)


def load_pt2(path: str | Path) -> Any:
    """What an archive of :func:`export_pt2` computes, to be called."""
    return torch.export.load(path).module()
