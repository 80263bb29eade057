"""Append and attend markers for a step whose caches are inputs, of whatever spelling."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from kvquant_compile.capture.attention_sites import attention_cuts, mark_sites
from kvquant_compile.capture.cache_updates import Update
from kvquant_compile.capture.edit import SIZE, add_call, add_transpose, later, sort_topologically
from kvquant_compile.capture.markers import APPEND
from kvquant_compile.capture.site import Site
from kvquant_compile.capture.site_meaning import Meaning
from kvquant_compile.errors import UnsupportedLayerError


@dataclass(frozen=True)
class _CachedSite(Site):
    """A cut whose keys and values are put in where the step finds them: cached ones, new ones."""

    updates: tuple[Update, Update]

    def feed(self, k: Tensor, v: Tensor, past: int) -> dict[fx.Node, Tensor]:
        keys, values = self.updates
        return {**keys.feed(k, past), **values.feed(v, past)}

    @property
    def room(self) -> int:
        return min((u.kind.capacity for u in self.updates if u.kind.capacity), default=0)


def mark_cached_attention(gm: fx.GraphModule, updates: Sequence[Update]) -> list[Meaning]:
    """Replace caches and the attention to them by append, mask and attend markers.

    Afterwards the graph's inputs are ``ids`` and ``past``, and its output is the result.

    Returns:
        What each attention means, in graph order.

    Raises:
        UnsupportedLayerError: a cache is not attended to, or read by something else; or an
            attention has an unknown meaning.
    """
    graph = gm.graph
    graph.output_node().args = (graph.output_node().args[0][0],)  # type: ignore[index]
    past = _past_input(graph, updates)
    graph.eliminate_dead_code()
    owner = {node: update for update in updates for node in update.inner}
    layers: dict[tuple[Update, Update], tuple[int, fx.Node, fx.Node]] = {}
    sites = []
    for out, query, key, value in list(attention_cuts(graph, owner)):
        pair = owner[key], owner[value]
        if pair not in layers:
            layers[pair] = (len(layers), *_append(graph, pair, len(layers), past))
        index, keys, values = layers[pair]
        sites.append(_CachedSite(index, out, query, keys, values, pair))
    _need_all(updates, layers)
    sort_topologically(graph)
    meanings = mark_sites(gm, sites)
    for update in updates:
        if update.leaf.users:
            user = next(iter(update.leaf.users))
            raise _unread(f"{update.leaf.name} is also read by {user}")
        graph.erase_node(update.leaf)
    graph.lint()
    gm.recompile()
    return meanings


def _past_input(graph: fx.Graph, updates: Sequence[Update]) -> fx.Node:
    """The ``past`` input; where there is none, sizes of the caches are expressed by a new one."""
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    if "past" in inputs:
        return inputs["past"]
    ids, first = inputs["ids"], updates[0]
    with graph.inserting_after(ids):
        past = graph.placeholder("past")
    past.meta["val"] = first.leaf.meta["val"].shape[first.kind.axis]
    shape = ids.meta["val"].shape
    batch, new = (add_call(graph, past, SIZE, (ids, d), shape[d]) for d in (0, 1))
    whole = past.meta["val"] + new.meta["val"]
    total = add_call(graph, new, operator.add, (past, new), whole)
    for update in updates:
        for node in (update.leaf, *update.inner):
            length = past if node is update.leaf else total
            for user in [u for u in node.users if u.target is SIZE]:
                at = user.args[1] % 4  # type: ignore[operator]
                if at in (0, update.kind.axis) and node.meta["val"].ndim == 4:
                    user.replace_all_uses_with(batch if at == 0 else length)
    return past


def _append(
    graph: fx.Graph, pair: tuple[Update, Update], index: int, past: fx.Node
) -> tuple[fx.Node, fx.Node]:
    fresh = [u.new if u.kind.heads_first else add_transpose(graph, u.new) for u in pair]
    values = tuple(node.meta["val"] for node in fresh)
    append = add_call(graph, later(graph, *fresh), APPEND, (*fresh, index, past), values)
    keys, vals = (add_call(graph, append, operator.getitem, (append, i), values[i]) for i in (0, 1))
    return keys, vals


def _need_all(updates: Sequence[Update], pairs: object) -> None:
    used = [update for pair in pairs for update in pair]  # type: ignore[attr-defined]
    if len(used) != len(updates) or set(used) != set(updates):
        left = [u.leaf.name for u in updates if u not in used]
        raise _unread(f"no attention reads {', '.join(left) or 'every cache tensor only once'}")


def _unread(why: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        "a cache layer cannot be captured",
        why=why,
        do="Attend to each layer's keys and values by scaled_dot_product_attention, or by"
        " matmul, softmax, matmul, with four-dimensional queries.",
    )
