"""Models whose cache keeps the positions of all tokens, for an index that rotates anew each step.

Such a backbone makes its tables of cosines and sines for every token so far, gives them to the
modules that choose keys, and takes the step's own rows of them for its attention. The graph is
traced without a history, so that the attention sees the step's rows. What a leaf is given is then
made once more from all positions, which live beside the leaves' states.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from transformers.cache_utils import Cache

from kvquant_compile.capture.attribute_states import kept_in
from kvquant_compile.capture.edit import SIZE, add_call, sort_topologically
from kvquant_compile.capture.leaves import STATES, Leaf
from kvquant_compile.errors import UnsupportedModelError

# Where models leave positions: in a cache layer with an index, in older releases in the cache.
_ON_LAYER, _ON_CACHE = "indexer_position_ids", "position_ids"
_NAME, _KEPT = "kvquant_position_history", "positions"


class PositionHistory(nn.Module):
    """Adds a step's positions to those that the states keep."""

    def forward(self, states: Cache | None, positions: Tensor) -> Tensor:
        """Positions of all tokens [B, T], a step's own [B, S] last; these alone without states."""
        if states is None:
            return positions
        kept = kept_in(states)
        if _KEPT in kept:
            positions = torch.cat([kept[_KEPT], positions], 1)
        kept[_KEPT] = positions
        return positions


def keeps_positions(cache: Cache) -> bool:
    """Whether a run has left positions in a cache."""
    left = [getattr(layer, _ON_LAYER, None) for layer in cache.layers]
    return any(x is not None for x in (*left, getattr(cache, _ON_CACHE, None)))


def pass_all_positions(gm: fx.GraphModule) -> None:
    """Give leaves the tables of all positions in place of those of a step's.

    Args:
        gm: a captured graph that calls its leaves.

    Raises:
        UnsupportedModelError: no leaf keeps a state, or no table reaches one.
    """
    graph = gm.graph
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    positions = inputs["position_ids"]
    leaves = [
        node
        for node in graph.find_nodes(op="call_module")
        if isinstance(gm.get_submodule(node.target), Leaf)
    ]
    known = _from_positions(graph, positions)
    tables = {a for leaf in leaves for a in leaf.args if isinstance(a, fx.Node) and known.get(a)}
    if STATES not in inputs or not tables:
        raise UnsupportedModelError(
            "the model cannot be captured",
            why="its cache keeps the positions of all tokens, but no module that keeps a state is"
            " given a table of them",
            do="Report the model; what it uses them for is not known.",
        )
    gm.add_submodule(_NAME, PositionHistory())
    with graph.inserting_after(inputs[STATES]):
        history = graph.call_module(_NAME, (inputs[STATES], positions))
    history.meta["val"] = positions.meta["val"]
    again = _made_again(graph, tables, known, positions, history)
    for leaf in leaves:
        leaf.args = tuple(again.get(a, a) if isinstance(a, fx.Node) else a for a in leaf.args)
    sort_topologically(graph)
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()


def _from_positions(graph: fx.Graph, positions: fx.Node) -> dict[fx.Node, bool]:
    """Nodes that depend on nothing but positions, constants and a step's sizes, in graph order;
    and whether they depend on positions or on the number of tokens."""
    known = {positions: True}
    for node in graph.nodes:
        if node.target is SIZE and node.args[0].target in ("hidden", "position_ids"):
            known[node] = node.args[1] == 1
        elif node.op == "get_attr":
            known[node] = False
        elif node.op == "call_function" and all(i in known for i in node.all_input_nodes):
            known[node] = any(known[i] for i in node.all_input_nodes)
    return known


def _made_again(
    graph: fx.Graph,
    tables: set[fx.Node],
    known: dict[fx.Node, bool],
    positions: fx.Node,
    history: fx.Node,
) -> dict[fx.Node, fx.Node]:
    """Copies of tables, and of what they come from, with all positions in place of a step's."""
    needed, pending = set(), list(tables)
    while pending:
        node = pending.pop()
        if known[node] and node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    copies = {positions: history}
    last = history
    for node in [n for n in known if n in needed and n is not positions]:
        if node.target is SIZE:
            last = add_call(graph, last, SIZE, (history, 1), node.meta["val"])
        else:
            with graph.inserting_after(last):
                last = graph.node_copy(node, lambda n: copies.get(n, n))
        copies[node] = last
    return copies
