"""``base[..., a:b].copy_(x)`` as ``slice_scatter``: what is written becomes a value of its own.

An in-place operation is no input of what reads its result, so that a graph with it cannot be
evaluated node by node, and dead code elimination has to keep it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_COPY = torch.ops.aten.copy_.default
_SLICE = torch.ops.aten.slice.Tensor
_SCATTER = torch.ops.aten.slice_scatter.default


def written_slices_as_values(gm: fx.GraphModule) -> None:
    """Rewrite copies into slices of a tensor whose other views are taken after them.

    Other in-place operations stay as they are.
    """
    graph = gm.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=_COPY):
        view = node.args[0]
        if node.users or not isinstance(view, fx.Node) or view.target is not _SLICE:
            continue
        base, *where = view.args
        assert isinstance(base, fx.Node)
        before = [u for u in base.users if u in order and order[u] < order[node] and u is not view]
        if len(view.users) > 1 or not _same_shape(node) or any(user.users for user in before):
            continue
        _scatter(graph, node, base, where)
        graph.erase_node(node)
        graph.erase_node(view)
    graph.lint()
    gm.recompile()


def _scatter(graph: fx.Graph, node: fx.Node, base: fx.Node, where: Sequence[Any]) -> None:
    with graph.inserting_after(node):
        whole = graph.call_function(_SCATTER, (base, node.args[1], *where))
    whole.meta["val"] = base.meta["val"]
    own = (node.args[0], whole)
    base.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in own)


def _same_shape(copy: fx.Node) -> bool:
    """Whether nothing is broadcast; sizes that only differ in their symbols are taken as equal."""
    source = copy.args[1]
    shapes = [list(node.meta["val"].shape) for node in (copy, source) if isinstance(node, fx.Node)]
    if len(shapes) < 2 or len(shapes[0]) != len(shapes[1]):
        return False
    return all(
        a == b if isinstance(a, int) or isinstance(b, int) else True
        for a, b in zip(*shapes, strict=True)
    )
