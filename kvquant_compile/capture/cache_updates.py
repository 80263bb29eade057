"""How each cache tensor of an exported step is changed, found by what the graph computes.

Between a cache tensor before the step and the same one after it lies a piece of graph: a
concatenation, a slice written, an index_copy, a scatter. Into it comes the step's new content; that
what comes out is the old content followed by the new one is checked on random numbers, at several
lengths. Nothing is matched by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvquant_compile.capture.run import Evaluator
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.capture.state import CacheLeaf
from kvquant_compile.errors import UnsupportedLayerError

# (tokens before, new ones) at which an update is checked.
_LENGTHS = ((5, 6), (0, 3), (7, 1))
_BATCH = 2


@dataclass(frozen=True, eq=False)
class Update:
    """One cache tensor of a step.

    Attributes:
        leaf: the graph's input.
        new: what the step adds, laid out as the leaf is.
        inner: nodes that hold the leaf's content and the new one.
        kind: how the leaf is laid out and kept.
    """

    leaf: fx.Node
    new: fx.Node
    inner: frozenset[fx.Node]
    kind: CacheLeaf

    def feed(self, whole: Tensor, past: int) -> dict[fx.Node, Tensor]:
        """Values of ``leaf`` and ``new`` for keys or values [B, H, past + S, D].

        Raises:
            ValueError: a cache that is written in place has no room for so many.
        """
        content = whole if self.kind.heads_first else whole.transpose(1, 2)
        axis, total = self.kind.axis, whole.shape[2]
        old = content.narrow(axis, 0, past)
        if self.kind.capacity:
            if total > self.kind.capacity:
                raise ValueError(f"{total} tokens in a cache of {self.kind.capacity}")
            old = self._in_room(old)
        return {self.leaf: old, self.new: content.narrow(axis, past, total - past)}

    def _in_room(self, old: Tensor) -> Tensor:
        """The cached tokens at the start of a whole tensor; what is behind them must not count."""
        axis = self.kind.axis
        shape = [*old.shape]
        shape[axis] = self.kind.capacity
        room = torch.full(shape, 3.0, dtype=old.dtype, device=old.device)
        room.narrow(axis, 0, old.shape[axis]).copy_(old)
        return room


def find_updates(
    gm: fx.GraphModule, leaves: Sequence[CacheLeaf], data: fx.Node
) -> tuple[Update, ...]:
    """The update of every leaf.

    Args:
        gm: an exported step without in-place operations; its last inputs are the leaves, its
            outputs a result and the leaves after the step.
        leaves: how they are laid out.
        data: the input that carries tokens.

    Raises:
        UnsupportedLayerError: a leaf changes otherwise than by new tokens behind the cached ones.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))[-len(leaves) :]
    outputs: Any = gm.graph.output_node().args[0]
    dependent = _downstream(data)
    return tuple(
        _update(gm, kind, leaf, node, dependent, i)
        for i, (kind, leaf, node) in enumerate(zip(leaves, inputs, outputs[1:], strict=True))
    )


def _update(
    gm: fx.GraphModule,
    kind: CacheLeaf,
    leaf: fx.Node,
    after: object,
    dependent: set[fx.Node],
    place: int,
) -> Update:
    if not isinstance(after, fx.Node) or after is leaf:
        raise _not_appended(place, "the step leaves it as it is")
    inner = frozenset(_downstream(leaf) & _upstream(after))
    sources = {i for node in inner for i in node.all_input_nodes} - inner - {leaf}
    new = [node for node in sources & dependent if isinstance(node.meta.get("val"), Tensor)]
    if len(new) != 1 or leaf not in _upstream(after):
        raise _not_appended(place, f"{len(new)} tensors are written into it")
    update = Update(leaf, new[0], inner, kind)
    _check(gm, update, after, place)
    return update


def _check(gm: fx.GraphModule, update: Update, after: fx.Node, place: int) -> None:
    fake, new = update.leaf.meta["val"], update.new.meta["val"]
    if fake.dtype != new.dtype:
        raise _not_appended(place, f"it is kept in {fake.dtype} and written in {new.dtype}")
    heads, width = fake.shape[1 if update.kind.heads_first else 2], fake.shape[3]
    generator = torch.Generator().manual_seed(0)
    for past, steps in _LENGTHS:
        shape = (_BATCH, int(heads), past + steps, int(width))
        whole = torch.randn(shape, generator=generator).to(fake.device, fake.dtype)
        values = {**input_values(gm, past, steps, _BATCH), **update.feed(whole, past)}
        try:
            with torch.no_grad():
                got = Evaluator(gm, values)(after)
        except (RuntimeError, KeyError, IndexError, ValueError) as error:
            raise _not_appended(place, f"it cannot be followed: {error}") from error
        got = got if update.kind.heads_first else got.transpose(1, 2)
        if got.shape[2] < past + steps or not torch.equal(got[:, :, : past + steps], whole):
            raise _not_appended(place, "what it holds is not the cached tokens, then the new ones")


def _not_appended(place: int, why: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        "a cache tensor cannot be captured",
        where=f"cache tensor {place}",
        why=why,
        do="Let a step put its keys and values behind those of the steps before it.",
    )


def _downstream(source: fx.Node) -> set[fx.Node]:
    """What is computed from a tensor's elements; sizes read off it lead nowhere."""
    return _reached(source, lambda node: [u for u in node.users if _has_tensor(u)])


def _upstream(source: fx.Node) -> set[fx.Node]:
    return {source} | _reached(source, lambda node: node.all_input_nodes)


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    items = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(item, Tensor) for item in items)


def _reached(source: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [source]
    while pending:
        for node in step(pending.pop()):
            if node not in found:
                found.add(node)
                pending.append(node)
    return found
