"""Which optimised models can be exported, and the reason where not."""

from __future__ import annotations

import torch
from torch import fx

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.errors import OptionError
from kvquant_compile.passes.rewrite import STEP_INPUTS
from kvquant_compile.runtime.installed import Installed

_NAMESPACES = ("aten", "prims", "kvquant")
_TOKEN_INPUTS = ("hidden", "per_layer_inputs", "ids", "position_ids")


def check_exportable(state: Installed) -> None:
    """Refuse what an exported graph cannot do.

    Raises:
        OptionError: naming the reason.
    """
    program = state.program
    for layout in program.layouts:
        if not isinstance(layout, PageLayout):
            raise _refusal(
                f"the recipe {layout.recipe.name} is no page format of fixed sections",
                'Use recipe="kvquant+" (the default).',
            )
        if layout.lossless:
            raise _refusal("lossless pages hold raw floats", "Pass bits from 1 to 8.")
        if layout.ring:
            raise _refusal(
                "what its ring of exact last tokens holds is the bits of integers among floats",
                "Leave recent_window out.",
            )
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
