"""A model's own check: proofs, lossless validation, and that sabotage of the cache is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from kvquant_compile.capture import Captured, capture
from kvquant_compile.evaluate.table import program_logits
from kvquant_compile.lowering import ops
from kvquant_compile.passes.recognise import recognise
from kvquant_compile.runtime.program import Program
from kvquant_compile.runtime.validate import lossless_program, validate_lossless

NOTICED = 1e-3


def run_selftest(
    model: nn.Module, example_inputs: tuple[Any, ...] | None = None
) -> dict[str, tuple[bool, str]]:
    """Check a model; nothing is changed.

    Returns:
        check -> (passed, detail).

    Raises:
        KVQuantError: the model cannot be captured or fails the lossless validation.
    """
    captured = capture(model, example_inputs)
    layers = recognise(captured)
    refused = [layer.plan.index for layer in layers if layer.plan.refusal]
    proofs = f"{len(layers)} layers, {len(refused)} refused {refused or ''}"
    errors = validate_lossless(captured, layers)
    change = sabotage_change(captured, lossless_program(captured, layers))
    return {
        "every rotation proved": (not refused, proofs),
        "lossless rewrite equals the original": (True, f"worst error {max(errors.values()):.1e}"),
        "a sabotaged cache changes the scores": (change > NOTICED, f"relative change {change:.1e}"),
    }


def sabotage_change(captured: Captured, program: Program) -> float:
    """Relative change of the logits when every value is stored as zero."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (1, 32), generator=generator).to(captured.device)
    honest = program_logits(captured, program)[0](ids)
    broken = program_logits(captured, sabotaged(program))[0](ids)
    return float((honest - broken).float().norm() / honest.float().norm())


def sabotaged(program: Program) -> Program:
    """A copy of a program that stores zeros instead of values."""
    source = program.graph_module
    graph = fx.Graph()
    graph.output(graph.graph_copy(source.graph, {}))
    for node in graph.find_nodes(op="call_function", target=ops.append):
        value = node.args[1]
        with graph.inserting_before(node):
            zero = graph.call_function(_zeros, (value,))
        node.update_arg(1, zero)
    return replace(program, graph_module=fx.GraphModule(source, graph))


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)
