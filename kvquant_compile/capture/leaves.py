"""Modules of the model that the graph calls as they are: opaque leaves.

The mixers of state-space and linear-attention layers unroll over the step's length when they are
traced, and what they keep is small and of fixed size. They stay the model's own modules: while
tracing, one opaque op stands for each; afterwards the graph calls the module, with the model's own
cache class for its state. That cache is the graph's input ``states``; None starts from nothing.
Modules whose Python control flow depends on data (loops over the experts that were hit) are leaves
without a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, DynamicCache

from kvquant_compile.capture.markers import STATEFUL
from kvquant_compile.errors import UnsupportedLayerError

STATES = "states"
_CACHE, _TENSOR = object(), object()


class Leaf(nn.Module):
    """Calls a module of the model with tensors and a cache put where it takes them.

    Args:
        module: the model's own.
        config: for the cache of a run that starts from nothing.
        leaves, spec: the flattened arguments; a marker stands for a tensor and for the cache.
    """

    def __init__(self, module: nn.Module, config: Any, leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self.module, self.config, self.leaves, self.spec = module, config, leaves, spec

    @property
    def has_state(self) -> bool:
        """Whether the module takes a cache."""
        return any(leaf is _CACHE for leaf in self.leaves)

    def new_states(self) -> DynamicCache:
        """An empty cache, of which only the states are used."""
        return DynamicCache(config=self.config)

    def forward(self, states: Cache | None, *tensors: Tensor) -> Tensor:
        """The module's first output."""
        cache = self.new_states() if states is None and self.has_state else states
        given = iter(tensors)
        filled = [
            next(given) if leaf is _TENSOR else cache if leaf is _CACHE else leaf
            for leaf in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        output = self.module(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


@dataclass
class Watch:
    """Which modules of a backbone have to be leaves.

    Attributes:
        stack: the modules that are running now.
        users: those that asked for a state, innermost ones, in order; and those that a tracer
            cannot enter.
        outputs: what each module last returned, in an eager run.
        traced: whether outputs are a tracer's now.
    """

    stack: list[nn.Module] = field(default_factory=list)
    users: dict[nn.Module, None] = field(default_factory=dict)
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    traced: bool = False

    def exclude(self) -> bool:
        """Make leaves of the module that failed and of all of its class; whether there is one."""
        if len(self.stack) < 2:  # the backbone itself
            return False
        kind = type(self.stack[-1])
        new = {m: None for m in self.outputs if type(m) is kind and m not in self.users}
        self.users |= new
        return bool(new)

    def note(self) -> None:
        """A state is being used."""
        self.users[self.stack[-1]] = None


class WatchedCache(DynamicCache):
    """A cache that tells a watch when a state is used."""

    watch: Watch | None = None

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """As of the base class."""
        return self._noted(super().get_conv_state, args, kwargs)

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """As of the base class."""
        return self._noted(super().get_recurrent_state, args, kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """As of the base class."""
        return self._noted(super().update_conv_state, args, kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """As of the base class."""
        return self._noted(super().update_recurrent_state, args, kwargs)

    def _noted(self, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.watch is not None and self.watch.stack:
            self.watch.note()
        return method(*args, **kwargs)


@contextmanager
def watching(backbone: nn.Module, watch: Watch) -> Iterator[None]:
    """Keep the watch's stack of running modules inside the block."""

    def enter(module: nn.Module, args: Any) -> None:
        watch.stack.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.stack.pop()
        if not watch.traced:
            watch.outputs[module] = output

    watch.stack.clear()
    hooks = []
    for module in backbone.modules():
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def opaque(watch: Watch, config: Any) -> Iterator[list[Leaf]]:
    """Every module with a state is one opaque op inside the block; the leaves come as they run.

    Raises (when such a module runs):
        UnsupportedLayerError: it does not map one tensor to one of its shape.
    """
    leaves: list[Leaf] = []
    before = {module: module.__dict__.get("forward") for module in watch.users}
    try:
        for module in watch.users:
            module.forward = _opaque_forward(module, module.forward, watch, config, leaves)
        yield leaves
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _opaque_forward(
    module: nn.Module,
    original: Callable[..., Any],
    watch: Watch,
    config: Any,
    leaves: list[Leaf],
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        values, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Cache))
        tensors = [value for value in values if isinstance(value, Tensor)]
        kept = [_kept(value) for value in values]
        like = _like(module, watch.outputs[module], tensors, kept)
        leaves.append(Leaf(module, config, kept, spec))
        result = STATEFUL(tensors, like, len(leaves) - 1)
        output = watch.outputs[module]
        return result if isinstance(output, Tensor) else (result, *([None] * (len(output) - 1)))

    return forward


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _TENSOR
    return _CACHE if isinstance(value, Cache) else value


def _like(module: nn.Module, output: Any, tensors: list[Tensor], kept: list[Any]) -> int:
    """Which input has the output's shape."""
    parts = [output] if isinstance(output, Tensor) else list(output)
    first = parts[0] if parts and isinstance(parts[0], Tensor) else None
    single = all(part is None for part in parts[1:])
    sizes = any(isinstance(value, torch.SymInt) for value in kept)
    if first is not None and single and not sizes:
        for i, tensor in enumerate(tensors):
            same = (tensor.ndim, tensor.shape[-1]) == (first.ndim, first.shape[-1])
            if same and tensor.is_floating_point():
                return i
    raise UnsupportedLayerError(
        "a layer that cannot be traced cannot be called from the graph either",
        where=type(module).__name__,
        why="it does not map one tensor to one of its shape",
        do="Report the model.",
    )


def call_leaves(gm: fx.GraphModule, leaves: list[Leaf]) -> None:
    """Replace the opaque ops by calls of the modules, with the input ``states``."""
    nodes = gm.graph.find_nodes(op="call_function", target=STATEFUL)
    if not nodes:
        return
    states = None
    if any(leaf.has_state for leaf in leaves):
        last = list(gm.graph.find_nodes(op="placeholder"))[-1]
        with gm.graph.inserting_after(last):
            states = gm.graph.placeholder(STATES, default_value=None)
    for node in nodes:
        tensors, _, index = node.args
        name = f"kvquant_leaf_{index}"
        gm.add_submodule(name, leaves[index])
        with gm.graph.inserting_before(node):
            state = states if leaves[index].has_state else None
            call = gm.graph.call_module(name, (state, *tensors))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


def new_states(gm: fx.GraphModule) -> DynamicCache | None:
    """An empty cache for a graph's leaves; None where it has none."""
    leaves = (m for m in gm.children() if isinstance(m, Leaf) and m.has_state)
    leaf = next(leaves, None)
    return None if leaf is None else leaf.new_states()
