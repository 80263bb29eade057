"""Running a captured graph whole, with a cache, or in part, with values put in at chosen nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kvquant_compile.capture.leaves import STATES, new_states
from kvquant_compile.capture.markers import APPEND

Store = dict[int | str, Any]


class _MarkedRun(fx.Interpreter):
    """Interprets a graph with markers; append reads and grows a store."""

    def __init__(self, gm: fx.GraphModule, store: Store) -> None:
        super().__init__(gm)
        self.gm, self.store = gm, store

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == STATES:
            if STATES not in self.store:
                self.store[STATES] = new_states(self.gm)
            return self.store[STATES]
        return super().placeholder(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if target is not APPEND:
            return super().call_function(target, args, kwargs)
        k, v, layer, past = args
        if past:
            old_k, old_v = self.store[layer]
            k, v = torch.cat([old_k[:, :, :past], k], 2), torch.cat([old_v[:, :, :past], v], 2)
        self.store[layer] = (k, v)
        return k, v


def run_marked(gm: fx.GraphModule, store: Store, *inputs: Any) -> Any:
    """Run a captured graph in full precision at any past length; the lossless reference.

    Args:
        gm: a captured graph.
        store: cache index -> (keys, values), each [B, Hkv, tokens, D]; grown in place. Empty for
            a first call; tokens beyond ``past`` are dropped. Recurrent states are kept under
            their own name.
        inputs: the graph's inputs in placeholder order, ``past`` (a plain int) among them.
    """
    return _MarkedRun(gm, store).run(*inputs)


class Evaluator:
    """Lazily evaluates nodes of a graph from given values of some of them.

    Args:
        gm: the module whose graph and attributes are read.
        values: node -> value; these nodes are taken as given, nothing before them is computed.
        widen: the model's dtype, where what a piece of graph means is to be told from how it
            rounds: what a model of half precision computes in that is computed in float32. A
            model of single precision means its roundings.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        values: Mapping[fx.Node, Any],
        *,
        widen: torch.dtype | None = None,
    ) -> None:
        self.gm, self.widen = gm, widen is not None and widened(widen) is not widen
        self.values: dict[fx.Node, Any] = {n: self._widened(v) for n, v in values.items()}

    def __call__(self, node: fx.Node) -> Any:
        """The value of a node.

        Raises:
            KeyError: it depends on a placeholder without a value.
        """
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [n for n in current.all_input_nodes if n not in self.values]
            if current in self.values:
                pending.pop()
            elif missing:
                pending += missing
            else:
                self.values[pending.pop()] = self._compute(current)
        return self.values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            raise KeyError(node.name)
        if node.op == "get_attr":
            return self._widened(attribute(self.gm, str(node.target)))
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._argument)
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _argument(self, value: Any) -> Any:
        return self.values[value] if isinstance(value, fx.Node) else self._widened(value)

    def _widened(self, value: Any) -> Any:
        if self.widen and isinstance(value, torch.dtype):
            return widened(value)
        if self.widen and isinstance(value, Tensor):
            return value.to(widened(value.dtype))
        return value


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision; any other dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def attribute(gm: fx.GraphModule, target: str) -> Any:
    """The parameter, buffer or constant which a get_attr node names."""
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value
