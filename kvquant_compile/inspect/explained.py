"""The report of an optimised model as it is now."""

from __future__ import annotations

import dataclasses

from kvquant_compile.inspect.report import Report
from kvquant_compile.inspect.source import layer_source
from kvquant_compile.runtime.installed import Installed


def explained(state: Installed, *, layer: int | None = None, source: bool = False) -> Report:
    """What ``kvquant_compile.explain`` returns; arguments as there.

    Raises:
        OptionError: the model has no such layer.
    """
    refused = state.decode.refusal
    step = f"eager, no CUDA graph: {refused}" if refused else "CUDA graph"
    report = dataclasses.replace(state.report, decode_step=step)
    if layer is not None:
        report = report.only(layer)
    if not source:
        return report
    kept = {x.index for x in report.layers}
    sources = tuple(layer_source(state.program, x) for x in state.layers if x.plan.index in kept)
    return dataclasses.replace(report, sources=sources)
