"""Adapters of an optimised model: how they stand, and whether the graph still computes them.

PEFT's layers choose between their adapters, and fold them into the weights, by Python state, which
a captured graph does not see. Layers are known by the switches they have. What they switch between
is read before every step; which layers and parameters there are, before every step of several
tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from typing import Any

from torch import fx, nn

from kvquant_compile.errors import OptionError

_SWITCHES = ("active_adapters", "merged_adapters", "disable_adapters")
# Kinds of PEFT adapters that are a full-precision cache, not a change of the layers.
_CACHES = ("PREFIX_TUNING", "CARTRIDGE")


class Adapters:
    """The layers of a model that have adapters, as the graph was captured with them.

    Args:
        model: may have none.
        graph: computes the model.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule) -> None:
        self._model = model
        self._layers = list(_adapted(model))
        self._made = self._parts()
        self._hooks = self._hooked()
        own = {id(parameter) for parameter in model.parameters()}
        self._parameters = own & {id(parameter) for parameter in _read_by(graph)}
        self._graph = graph  # keeps the parameters alive, so that no other has their id

    def state(self) -> Hashable:
        """How the adapters stand: equal states compute the same."""
        return tuple(map(_switches, self._layers)), self._made

    def check_calls(self) -> None:
        """Refuse what only this call does to the layers.

        Raises:
            OptionError: hooks were put on them, as PEFT does for ``adapter_names=``.
        """
        if self._layers and self._hooked() != self._hooks:
            for layer, before in zip(self._layers, self._hooks, strict=True):
                _drop_hooks(layer, before)  # PEFT leaves them behind where a call fails
            raise OptionError(
                "adapters of this call only (adapter_names=, or hooks on their layers)",
                why="the graph computes the same adapters for every sequence",
                do="Call the model once for each adapter, or kvquant_compile.restore(model) first.",
            )

    def check_layers(self) -> None:
        """Compare layers and parameters with what the graph reads, and look for adapters that
        were loaded anew.

        Raises:
            OptionError: adapters were added or unloaded, or weights replaced, since.
        """
        self._made = self._parts()
        same = list(_adapted(self._model)) == self._layers
        if same and self._parameters <= {id(p) for p in self._model.parameters()}:
            return
        raise OptionError(
            "layers or weights of the model were replaced since it was optimised",
            why="its graph computes the ones that it was captured with",
            do="Call kvquant_compile.restore(model) and optimize again.",
        )

    def _parts(self) -> tuple[int, ...]:
        """Which modules and parameters the adapters are; loading one makes new ones."""
        groups = [group for layer in self._layers for group in layer.children()]
        parts = (part for g in groups for part in (*g._modules.values(), *g._parameters.values()))
        return tuple(map(id, parts))

    def _hooked(self) -> list[tuple[Hashable, ...]]:
        return [tuple(layer._forward_pre_hooks) for layer in self._layers]


def _adapted(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if all(hasattr(type(m), s) for s in _SWITCHES))


def _read_by(gm: fx.GraphModule) -> Iterator[Any]:
    """Parameters of the modules that it calls, and those that it reads itself."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            yield operator.attrgetter(str(node.target))(gm)
        elif node.op == "call_module":
            yield from gm.get_submodule(str(node.target)).parameters()


def _drop_hooks(layer: nn.Module, kept: tuple[Hashable, ...]) -> None:
    """Take PEFT's own hooks for one call off a layer."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        module = getattr(getattr(hook, "func", hook), "__module__", "")
        if key not in kept and module.split(".")[0] == "peft":
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _switches(layer: Any) -> Hashable:
    scaling = getattr(layer, "scaling", None)
    return (
        tuple(layer.active_adapters),
        tuple(layer.merged_adapters),
        bool(layer.disable_adapters),
        tuple(scaling.items()) if isinstance(scaling, dict) else str(scaling),
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper of PEFT's; any other model itself.

    Raises:
        OptionError: the wrapper's adapter is a cache of keys and values.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) or not hasattr(model, "peft_config"):
        return model
    tuner: Any = getattr(model, "base_model", None)
    for inner in (tuner, getattr(tuner, "model", None)):
        if isinstance(inner, PreTrainedModel):
            _refuse_caches(model)
            return inner
    return model


def _refuse_caches(wrapper: nn.Module) -> None:
    config: Any = getattr(wrapper, "active_peft_config", None)
    kind = getattr(config, "peft_type", "")
    name = str(getattr(kind, "value", kind))
    if name in _CACHES:
        raise OptionError(
            f"a {type(wrapper).__name__} with {name} cannot be optimised",
            why="it brings keys and values of its own in full precision to every call",
            do="Use an adapter of the layers (LoRA and its kin), or prompt tuning.",
        )
