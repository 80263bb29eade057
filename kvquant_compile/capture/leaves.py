"""Modules of the model that the graph calls as they are: opaque leaves.

The mixers of state-space and linear-attention layers unroll over the step's length when they are
traced, and what they keep is small and of fixed size. They stay the model's own modules: while
tracing, one opaque op stands for each; afterwards the graph calls the module, with the model's own
cache class for its state. That cache is the graph's input ``states``; None starts from nothing.
Modules whose Python control flow depends on data (loops over the experts that were hit), or whose
weights are of a class that a tracer loses, are leaves without a state.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, DynamicCache

from kvquant_compile.capture.attribute_states import held_by
from kvquant_compile.capture.edit import add_call
from kvquant_compile.capture.markers import STATEFUL
from kvquant_compile.capture.own_cache import CacheKind
from kvquant_compile.capture.torch_internals import is_symbolic, loses_class, size_hint
from kvquant_compile.errors import UnsupportedLayerError

STATES = "states"
_CACHE, _TENSOR = object(), object()


class Leaf(nn.Module):
    """Calls a module of the model with tensors and a cache put where it takes them.

    Args:
        module: the model's own.
        caches: makes the cache of a run that starts from nothing.
        leaves, spec: the flattened arguments; a marker stands for a tensor and for the cache.
    """

    def __init__(self, module: nn.Module, caches: CacheKind, leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self.module, self.caches, self.leaves, self.spec = module, caches, leaves, spec
        self.attributes = [state for state in caches.attributes if state.owner is module]

    @property
    def has_state(self) -> bool:
        """Whether the module takes a cache, or has attributes that one keeps."""
        return bool(self.attributes) or any(leaf is _CACHE for leaf in self.leaves)

    def new_states(self) -> DynamicCache:
        """An empty cache, of which only the states are used."""
        return self.caches.new_states()

    def forward(self, states: Cache | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The module's outputs that are tensors."""
        cache = self.new_states() if states is None and self.has_state else states
        given = iter(tensors)
        filled = [
            next(given) if leaf is _TENSOR else cache if leaf is _CACHE else leaf
            for leaf in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        with nullcontext() if cache is None else held_by(cache, self.attributes):
            outputs = pytree.tree_leaves(self.module(*args, **kwargs))
        return tuple(output for output in outputs if isinstance(output, Tensor))


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
        if self.stack:
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

    def update_indexer(self, *args: Any, **kwargs: Any) -> Any:
        """As of the base class."""
        return self._noted(super().update_indexer, args, kwargs)

    def _noted(self, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.watch is not None:
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
        if any(loses_class(weight) for weight in module.parameters(recurse=False)):
            watch.users[module] = None
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def opaque(watch: Watch, caches: CacheKind) -> Iterator[list[Leaf]]:
    """Every module with a state is one opaque op inside the block; the leaves come as they run.

    Raises (when such a module runs):
        UnsupportedLayerError: it gives no tensor, or is given a size.
    """
    leaves: list[Leaf] = []
    before = {module: module.__dict__.get("forward") for module in watch.users}
    try:
        for module in watch.users:
            module.forward = _opaque_forward(module, module.forward, watch, caches, leaves)
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
    caches: CacheKind,
    leaves: list[Leaf],
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        values, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Cache))
        tensors = [value for value in values if isinstance(value, Tensor)]
        leaves.append(Leaf(module, caches, [_kept(value) for value in values], spec))
        parts, structure = pytree.tree_flatten(watch.outputs[module])
        _check(module, parts, values)
        results, place = list(parts), 0
        for i, part in enumerate(parts):
            if isinstance(part, Tensor):
                shape = _shape(part, tensors)
                results[i] = STATEFUL(tensors, shape, part.dtype, len(leaves) - 1, place)
                place += 1
        return pytree.tree_unflatten(results, structure)

    return forward


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _TENSOR
    return _CACHE if isinstance(value, Cache) else value


def _check(module: nn.Module, outputs: list[Any], values: list[Any]) -> None:
    """Whether a call in the graph can stand for the module's."""
    sizes = any(is_symbolic(value) for value in values)
    if sizes or not any(isinstance(output, Tensor) for output in outputs):
        raise UnsupportedLayerError(
            "a layer that cannot be traced cannot be called from the graph either",
            where=type(module).__name__,
            why="it is given a size" if sizes else "it gives no tensor",
            do="Report the model.",
        )


def _shape(output: Tensor, inputs: list[Tensor]) -> list[Any]:
    """The sizes of an output of an eager run, by the tracer's sizes of the inputs.

    Eager run and trace have the same sizes, so what is equal is the same: the batch where it
    leads, lengths elsewhere.
    """
    known = [
        (min(axis, 1), size)
        for tensor in inputs
        for axis, size in enumerate(tensor.shape)
        if is_symbolic(size)
    ]
    sizes: list[Any] = []
    for axis, length in enumerate(output.shape):
        same = [size for at, size in known if at == min(axis, 1) and size_hint(size) == length]
        sizes.append(same[0] if same else length)
    return sizes


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
    calls: dict[int, fx.Node] = {}
    for node in nodes:
        tensors, _, _, index, output = node.args
        if index not in calls:
            name = f"kvquant_leaf_{index}"
            gm.add_submodule(name, leaves[index])
            with gm.graph.inserting_before(node):
                state = states if leaves[index].has_state else None
                calls[index] = gm.graph.call_module(name, (state, *tensors))
            calls[index].meta = {**node.meta, "val": []}
        calls[index].meta["val"].append(node.meta["val"])
        part = add_call(gm.graph, node, operator.getitem, (calls[index], output), node.meta["val"])
        node.replace_all_uses_with(part)
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


def new_states(gm: fx.GraphModule) -> DynamicCache | None:
    """An empty cache for a graph's leaves; None where it has none."""
    leaves = (m for m in gm.children() if isinstance(m, Leaf) and m.has_state)
    leaf = next(leaves, None)
    return None if leaf is None else leaf.new_states()
