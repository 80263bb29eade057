"""The graph of an optimised model follows its adapters.

Whoever switches, disables, scales or merges an adapter gets a graph of the model as it is then:
captured, proved, validated and rewritten anew on its next step, with the formats and tables that
there are. Graphs of the latest states are kept, so that switching back costs nothing.
"""

from __future__ import annotations

import torch

from kvquant_compile.capture import capture
from kvquant_compile.capture.cleanup import evaluation_mode
from kvquant_compile.errors import OptionError
from kvquant_compile.logs import logger
from kvquant_compile.passes.absorb import changed_since
from kvquant_compile.passes.recognise import MatchedLayer, recognise
from kvquant_compile.plan import LayerPlan, RopeSpec
from kvquant_compile.recipes.choice import stored_layers
from kvquant_compile.runtime.installed import Installed, Variant
from kvquant_compile.runtime.program import build_program
from kvquant_compile.runtime.validate import validate_lossless

KEPT = 4
_log = logger("runtime")


def follow_adapters(state: Installed, steps: int) -> None:
    """Let the model's present adapters be what its next step of so many tokens computes.

    Raises:
        OptionError: the step's adapters cannot be followed, or layers were replaced, or weights
            that the graph holds in another form were written.
        KVQuantError: the model as it is now cannot be optimised.
    """
    adapters = state.adapters
    adapters.check_calls()
    if steps > 1:
        adapters.check_layers()
    now = adapters.state()
    if now == state.adapted:
        if steps > 1 and changed_since(state.captured.graph_module):
            raise OptionError(
                "weights of latent attention were written since the model was optimised",
                why="its graph holds their product with the query, made then",
                do="Call kvquant_compile.restore(model) and optimize again.",
            )
        return
    found = state.variants.pop(now, None)
    if found is None or changed_since(found.captured.graph_module):
        found = _variant(state)
    state.variants[state.adapted] = Variant(state.captured, state.layers, state.program)
    while len(state.variants) > KEPT:
        del state.variants[next(iter(state.variants))]
    state.become(found, now)


def _variant(state: Installed) -> Variant:
    """The model as it is now, with the formats and tables of before."""
    before = state.captured
    if before.convention != "transformers":
        raise OptionError(
            "the model's adapters have changed since it was optimised",
            why="its graph computes the adapters that were active then, beside the weights as"
            " they were",
            do="Set them back, or call kvquant_compile.restore(model), change them, and"
            " optimize again.",
        )
    specs, tables = state.artifact.specs, state.program.tables
    _log.info("adapters have changed: %s is captured anew", type(before.model).__name__)
    with (
        state.taken_out(),
        torch.inference_mode(False),
        torch.no_grad(),
        evaluation_mode(before.model),
    ):
        captured = capture(before.model)
        layers = stored_layers(recognise(captured), specs)
        _check_same(layers, state.layers)
        validate_lossless(captured, layers)
        program = build_program(captured, layers, specs, tables)
    if any(table is not None for table in tables.values()):
        state.warn_once(
            "the model's adapters have changed since it was optimised; its tables were calibrated "
            "for the weights of then, and may fit less well. optimize anew to calibrate"
        )
    return Variant(captured, layers, program)


def _check_same(layers: tuple[MatchedLayer, ...], before: tuple[MatchedLayer, ...]) -> None:
    """Pages that were written before must mean the same afterwards."""
    told, known = ([_stored(layer.plan) for layer in found] for found in (layers, before))
    if told != known:
        raise OptionError(
            "the model's adapters have changed how its keys are stored",
            why=f"cache layers are now {told}, and were {known}",
            do="Call kvquant_compile.restore(model) and optimize again.",
        )


def _stored(plan: LayerPlan) -> tuple[int, int, int, int, RopeSpec | None]:
    return plan.index, plan.kv_heads, plan.key_dim, plan.value_dim, plan.rope
