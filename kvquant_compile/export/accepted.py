"""Which optimised models can be exported, in which form, and the reason where not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.errors import OptionError
from kvquant_compile.inspect.report import build_report
from kvquant_compile.passes.rewrite import STEP_INPUTS
from kvquant_compile.runtime.installed import Installed
from kvquant_compile.runtime.program import build_program

_NAMESPACES = ("aten", "prims", "kvquant")
_TOKEN_INPUTS = ("hidden", "per_layer_inputs", "ids", "position_ids")


def exportable(state: Installed) -> Installed:
    """The model as it is exported: without a ring of exact last tokens, which one warning says.

    What a ring holds is kept as the bits of integers among floats, which other runtimes need not
    preserve. Its tokens are in the pages as well, which are the same with and without it.

    Raises:
        OptionError: an exported graph cannot do what the model does; naming the reason.
    """
    _check(state)
    recent = max((layout.ring for layout in state.program.layouts), default=0)
    if not recent:
        return state
    state.warn_once(
        f"exported files keep no exact last tokens (recent_window={recent}): they read all tokens "
        "but the first from their codes; pass recent_window=0 to optimize for a model that "
        "computes what its file does"
    )
    return _without_ring(state)


def _without_ring(state: Installed) -> Installed:
    captured, layers = state.captured, state.layers
    specs, tables = state.artifact.for_model(captured, layers)
    plain = {i: replace(s, recent_tokens=0) for i, s in specs.items() if isinstance(s, CodecSpec)}
    artifact = replace(state.artifact, specs=plain)
    program = build_program(captured, layers, plain, tables)
    report = build_report(captured, layers, program, state.report.validation, artifact)
    return replace(state, program=program, artifact=artifact, report=report)


def _check(state: Installed) -> None:
    """Refuse what an exported graph cannot do."""
    program = state.program
    for layout in program.layouts:
        if not isinstance(layout, PageLayout):
            raise _refusal(
                f"the recipe {layout.recipe.name} is no page format of fixed sections",
                'Use recipe="kvquant+" (the default).',
            )
        if layout.lossless:
            raise _refusal("lossless pages hold raw floats", "Pass bits from 1 to 8.")
    if program.dtype is not torch.float32 or program.device.type != "cpu":
        raise _refusal(
            f"it computes in {program.dtype} on {program.device}",
            "Load it with dtype=torch.float32 on the CPU and optimize it there; a saved artifact "
            "is not bound to either.",
        )
    sites = [site for layer in state.layers for site in layer.plan.attends]
    if any(site.selects or site.query_sinks or site.bias_extent for site in sites):
        raise _refusal(
            "its queries compute biases or sinks, or choose the keys that they attend to",
            "Export another model; such attention runs in torch only.",
        )
    known = (*_TOKEN_INPUTS, *STEP_INPUTS)
    unknown = [
        name for name in program.inputs
        if name not in known and not name.startswith(("pages_", "sinks_"))
    ]  # fmt: skip
    if unknown:
        raise _refusal(
            f"its graph also takes {', '.join(unknown)}, which a step's tokens do not determine",
            "Export another model; hybrids with recurrent states run in torch only.",
        )
    foreign = sorted(
        {str(node.target) for node in program.graph_module.graph.nodes if _is_foreign(node)}
    )
    if foreign:
        raise _refusal(
            f"its graph calls {', '.join(foreign)}, which only a library's own runtime has",
            "Export another model; mixtures of experts run in torch only.",
        )
    if any(node.op == "call_module" for node in program.graph_module.graph.nodes):
        raise _refusal(
            "some of its modules cannot be traced and are called as they are",
            "Export another model; experts that are chosen in Python run in torch only.",
        )


def _is_foreign(node: fx.Node) -> bool:
    """Whether a node calls an op that is neither torch's nor ours."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in _NAMESPACES


def _refusal(why: str, do: str) -> OptionError:
    return OptionError("this model cannot be exported", why=why, do=do)
