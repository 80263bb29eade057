"""A graph that is run again from a node on gives what a whole run gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from kvquant_compile.mixed.resume import Resumable


class Layers(nn.Module):
    """Three layers of which the middle one is scaled from outside."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        whole = x
        for part in self.parts:
            seen = scaled(part(whole))
            whole = whole.add_(seen) if self.in_place else whole + seen
        return whole


FACTOR = [1.0]


@fx.wrap
def scaled(x: Tensor) -> Tensor:
    return x * FACTOR[0]


@pytest.fixture(autouse=True)
def _factor() -> None:
    FACTOR[0] = 1.0


def traced(*, in_place: bool = False) -> tuple[fx.GraphModule, dict[fx.Node, str]]:
    torch.manual_seed(0)
    gm = fx.symbolic_trace(Layers(in_place=in_place))
    nodes = [n for n in gm.graph.nodes if n.target is scaled]
    return gm, dict(zip(nodes, "abc", strict=True))


class Counting(Resumable):
    """Counts the nodes that run."""

    count = 0

    def run_node(self, n: fx.Node) -> object:
        self.count += 1
        return super().run_node(n)


def test_from_every_place_on() -> None:
    gm, places = traced()
    graph, x = Counting(gm, places), torch.randn(2, 4)
    with torch.no_grad():
        exact = graph.run(x)
        assert torch.equal(exact, gm(x))
        every = graph.count
        for name, left in (("c", 3), ("a", every - 2), ("b", every - 5)):
            graph.count = 0
            assert torch.equal(graph.resume(name, x), exact)
            assert graph.count == left
        FACTOR[0] = 3.0  # from here on something else
        last = graph.resume("c", x)
        assert not torch.equal(last, exact)
        assert not torch.equal(last, graph.resume("b", x))
        FACTOR[0] = 1.0
        assert torch.equal(graph.resume("b", x), exact), "what is kept is of the first run"


def test_a_place_that_was_not_reached_runs_everything() -> None:
    gm, places = traced()
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(Resumable(gm, places).resume("b", x), gm(x))


def test_graphs_that_change_tensors_in_place_run_from_the_beginning() -> None:
    gm, places = traced(in_place=True)
    graph, x = Counting(gm, places), torch.randn(2, 4)
    with torch.no_grad():
        exact = graph.run(x.clone())
        every, graph.count = graph.count, 0
        assert torch.equal(graph.resume("b", x.clone()), exact)
        assert graph.count == every


def test_tensors_without_versions_are_not_trusted() -> None:
    gm, places = traced()
    graph, x = Counting(gm, places), torch.randn(2, 4)
    with torch.inference_mode():
        exact = graph.run(x)
        every, graph.count = graph.count, 0
        assert torch.equal(graph.resume("b", x), exact)
    assert graph.count == every
