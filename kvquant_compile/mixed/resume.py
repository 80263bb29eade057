"""Runs of one graph that differ from some node on: what comes before it runs once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_aggregate


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """What a graph has computed before a node.

    Attributes:
        values: every node before it -> its value, None where nobody needs that any more.
        versions: of the tensors among them, which tell whether one was changed in place; None of
            those of inference mode, which have none.
    """

    values: dict[fx.Node, Any]
    versions: list[tuple[Tensor, int | None]]

    @staticmethod
    def take(graph: fx.Graph, node: fx.Node, live: dict[fx.Node, Any]) -> _Snapshot:
        """Of the values that are still needed when ``node`` is about to run."""
        found: list[tuple[Tensor, int | None]] = []

        def see(x: Any) -> Any:
            if isinstance(x, Tensor):
                found.append((x, None if x.is_inference() else x._version))
            return x

        values: dict[fx.Node, Any] = {}
        for earlier in graph.nodes:
            if earlier is node:
                break
            values[earlier] = map_aggregate(live.get(earlier), see)
        return _Snapshot(values, found)

    @property
    def intact(self) -> bool:
        """Whether nothing was changed, as far as can be told."""
        return all(v is not None and x._version == v for x, v in self.versions)


class Resumable(fx.Interpreter):
    """A graph that can be run again from chosen nodes on, for the same arguments.

    Holds what is needed behind each of them: of a transformer some five activations a layer.
    Nothing may be differentiated.

    Args:
        gm: the graph.
        starts: node -> name of the place before it.
    """

    def __init__(self, gm: fx.GraphModule, starts: Mapping[fx.Node, Hashable]) -> None:
        super().__init__(gm)
        self.starts = starts
        self._taken: dict[Hashable, _Snapshot] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node; before the first of a place, keeps what is there."""
        name = self.starts.get(n)
        if name is not None and name not in self._taken:
            self._taken[name] = _Snapshot.take(self.graph, n, self.env)
        return super().run_node(n)

    def resume(self, name: Hashable, *args: Any) -> Any:
        """The graph's result, computed from a place on; from its beginning where the place was not
        reached before, or where what was kept may have been changed in place."""
        kept = self._taken.get(name)
        if kept is None or not kept.intact:
            return self.run(*args)
        return self.run(*args, initial_env=dict(kept.values))
