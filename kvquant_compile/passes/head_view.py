"""A stored key where the model itself has it, and the way from there to [B, H, S, D].

The recogniser adds views where a model keeps keys in another layout. Nothing reads them before
the rewrite, so whoever differentiates by keys, or replaces them, must do so at their source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True, eq=False)
class HeadView:
    """A node of the model and the added views that lead from it to head layout.

    Attributes:
        node: read by the model.
        views: transposes and unflattenings, in order; empty when ``node`` has head layout.
    """

    node: fx.Node
    views: tuple[fx.Node, ...]

    @staticmethod
    def of(node: fx.Node) -> HeadView:
        """Go back from a node to the first one that something else reads."""
        views: list[fx.Node] = []
        while not set(node.users) - set(views[:1]):
            views.insert(0, node)
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source
        return HeadView(node, tuple(views))

    def __call__(self, x: Tensor) -> Tensor:
        """To [B, H, S, D]."""
        for view in self.views:
            target: Any = view.target
            x = target(x, *view.args[1:])
        return x

    def undo(self, x: Tensor) -> Tensor:
        """Back to the layout of ``node``."""
        for view in reversed(self.views):
            split = view.target is torch.ops.aten.unflatten.int
            x = x.flatten(2, 3) if split else x.transpose(1, 2)
        return x
