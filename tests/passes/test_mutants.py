"""Single edits of real rotary code: what is no rotation any more must be refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import fx

from kvquant_compile.capture import APPEND, Captured
from kvquant_compile.capture.ops import op_name
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.passes import recognise
from kvquant_compile.passes.prove import Prover
from kvquant_compile.passes.taint import rotation_site, taint
from tests import zoo

aten = torch.ops.aten
SOURCES = ("llama", "cohere", "gpt_neox", "gpt_oss", "SdpaDecoder", "MatmulDecoder",
           "IsCausalDecoder")  # fmt: skip


def _source(name: str) -> Captured:
    return zoo.captured_decoder(name) if name.endswith("Decoder") else zoo.captured(name)


def _key(captured: Captured) -> fx.Node:
    return captured.graph_module.graph.find_nodes(op="call_function", target=APPEND)[0].args[0]


def _region(captured: Captured) -> tuple[fx.Node, list[fx.Node], set[fx.Node]]:
    """K_pre, the nodes between it and the key, and the tables."""
    data = "ids" if captured.convention == "functional" else "hidden"
    known = taint(captured.graph_module.graph, captured.placeholder(data))
    end = _key(captured)
    pre = rotation_site(end, known).pre
    above, pending = set(), [end]
    while pending:
        node = pending.pop()
        if node not in above and node is not pre and node in known.data:
            above.add(node)
            pending += node.all_input_nodes
    ordered = [n for n in captured.graph_module.graph.nodes if n in above]
    return pre, ordered, set(known.tables)


def _edits(captured: Captured) -> Iterator[tuple[str, int, str]]:
    """(name, position in the region, edit) of every mutant."""
    _, region, tables = _region(captured)
    for i, node in enumerate(region):
        name = op_name(node)
        if name == "neg":
            yield f"{node}: neg dropped", i, "drop"
        if name in ("add", "sub"):
            yield f"{node}: sign flipped", i, "sign"
            yield f"{node}: one term only", i, "drop"
        if name in ("cat", "stack"):
            yield f"{node}: reversed", i, "reverse"
        if name == "slice" and node.args[1] in (-1, 3):
            yield f"{node}: shifted", i, "shift"
        if name == "mul" and any(a in tables for a in node.args):
            yield f"{node}: product dropped", i, "drop"
            yield f"{node}: factor 1.5", i, "scale"
            yield f"{node}: table plus 1", i, "offset"
            yield f"{node}: other table", i, "table"
            yield f"{node}: table squared", i, "double"


def _mutate(captured: Captured, index: int, edit: str) -> Captured | None:
    mutant = zoo.clone_graph(captured)
    graph = mutant.graph_module.graph
    _, region, tables = _region(mutant)
    node = region[index]
    if edit == "drop":
        node.replace_all_uses_with(next(a for a in node.args if a not in tables))
    elif edit == "sign":
        node.target = {aten.add.Tensor: aten.sub.Tensor, aten.sub.Tensor: aten.add.Tensor}[
            node.target
        ]
    elif edit == "reverse":
        shapes = {tuple(map(str, a.meta["val"].shape)) for a in node.args[0]}
        if len(shapes) > 1:
            return None
        node.update_arg(0, list(node.args[0])[::-1])
    elif edit == "shift":
        start, stop = node.args[2:4]
        width = node.args[0].meta["val"].shape[-1]
        step = node.args[4] if len(node.args) > 4 else 1
        if step == 1 and stop >= width:
            node.args = (*node.args[:2], start - 1, width - 1)
        else:
            node.args = (*node.args[:2], start + 1, stop if step > 1 else stop + 1,
                         *node.args[4:])  # fmt: skip
        if node.args[2] >= 2 and step > 1:
            node.args = (*node.args[:2], 0, *node.args[3:])
    elif not _edit_table(graph, node, region, tables, edit):
        return None
    graph.lint()
    mutant.graph_module.recompile()
    return mutant


def _edit_table(graph, node, region, tables, edit) -> bool:
    place = next(i for i, a in enumerate(node.args) if a in tables)
    table = node.args[place]
    if edit == "table":
        others = [a for n in region for a in n.args if a in tables and a is not table]
        if not others:
            return False
        node.update_arg(place, others[0])
        return True
    with graph.inserting_before(node):
        if edit == "scale":
            new = graph.call_function(aten.mul.Tensor, (table, 1.5))
        elif edit == "offset":
            new = graph.call_function(aten.add.Tensor, (table, 1.0))
        else:
            new = graph.call_function(aten.mul.Tensor, (table, table))
    new.meta["val"] = table.meta["val"]
    node.update_arg(place, new)
    return True


def _matrix(captured: Captured, position: int) -> torch.Tensor:
    """The mutant's map of one head vector at one position, by running it on a basis."""
    pre, end = _region(captured)[0], _key(captured)
    shape = end.meta["val"].shape
    heads, width = shape[1], shape[3]
    values = input_values(captured.graph_module, position, 1, width)
    basis = torch.eye(width)[:, None, None, :].expand(width, heads, 1, width)
    first_head = pre.meta["val"].shape[1] == heads
    values[pre] = basis if first_head else basis.transpose(1, 2)
    with torch.no_grad():
        return Evaluator(captured.graph_module, values)(end)[:, 0, 0].T.double()


def _is_rotation(captured: Captured) -> bool:
    """The definition: M(p) = R(p) M(0), R orthogonal up to one scale, R(a) R(b) = R(a+b)."""
    start = _matrix(captured, 0)
    if torch.linalg.matrix_rank(start) < len(start):
        return False
    inverse = torch.linalg.inv(start)

    def turn(p: int) -> torch.Tensor:
        return _matrix(captured, p) @ inverse

    law = max(float((turn(a) @ turn(b) - turn(a + b)).abs().max())
              for a in (1, 3, 17) for b in (2, 5, 100))  # fmt: skip
    orthogonal = float((turn(5) @ turn(5).T - torch.eye(len(start))).abs().max())
    return law < 1e-4 and orthogonal < 1e-4


@pytest.mark.parametrize("name", SOURCES)
def test_no_mutant_that_is_no_rotation_is_proved(name):
    source = _source(name)
    refused = 0
    for what, index, edit in list(_edits(source)):
        mutant = _mutate(source, index, edit)
        if mutant is None:
            continue
        proof = Prover(mutant).prove(_key(mutant))
        if not _is_rotation(mutant):
            assert proof.spec is None, what
            refused += 1
    # One product of complex numbers leaves little to break: most edits are rotations again.
    assert refused >= (1 if name == "MatmulDecoder" else 4)


def test_the_unchanged_clone_is_proved():
    clone = zoo.clone_graph(zoo.captured("llama"))
    assert _is_rotation(clone)
    assert recognise(clone)[0].plan.rope is not None


def test_cos_and_sin_of_different_angles_are_refused():
    mutant = zoo.clone_graph(zoo.captured("llama"))
    graph = mutant.graph_module.graph
    (sine,) = graph.find_nodes(op="call_function", target=aten.sin.default)
    with graph.inserting_before(sine):
        doubled = graph.call_function(aten.mul.Tensor, (sine.args[0], 2.0))
    doubled.meta["val"] = sine.meta["val"]
    sine.update_arg(0, doubled)
    mutant.graph_module.recompile()
    plan = recognise(mutant)[0].plan
    assert plan.rope is None
    assert "different angles" in plan.refusal


def test_a_query_that_turns_otherwise_is_refused():
    source = zoo.captured("llama")
    mutant = zoo.clone_graph(source)
    graph = mutant.graph_module.graph
    key = _key(mutant)
    # q = x*cos + half(x)*sin; turning the key the other way keeps it a rotation.
    key.target = aten.sub.Tensor
    mutant.graph_module.recompile()
    assert Prover(mutant).prove(key).spec is not None
    assert "different embeddings" in recognise(mutant)[0].plan.refusal
    assert graph is not source.graph_module.graph
