"""The ops in compiled graphs: one graph without breaks, and the mutation survives."""

from __future__ import annotations

import pytest
import torch

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering import ops
from tests.lowering import reference as ref
from tests.lowering.test_ops import Harness, make_plan

STEPS = 5


def arguments(harness: Harness) -> tuple:
    """Everything one layer's step needs: (q, k, v, slots, history, table, positions, pages, sinks,
    tables, geometry), after 40 cached tokens."""
    torch.manual_seed(1)
    harness.step(40, exact=True)
    step = harness.cache.begin(torch.arange(40, 40 + STEPS).expand(2, STEPS), None)
    cache, layer = harness.cache, harness.cache.layers[0]
    q, k = torch.randn(2, 6, STEPS, 32), torch.randn(2, 2, STEPS, 32)
    return (q, k, k + 1, step.slots, step.history, cache.table, cache.positions, layer.slabs,
            layer.sinks, *harness.constants.arguments())  # fmt: skip


def layer(form: str, q, k, v, slots, history, table, positions, pages, sinks, tables, geometry):
    """What the rewritten graph does in a layer, with something fusible around it."""
    ops.append(k, v, slots, table, pages, sinks, tables, geometry, form)
    output, lse = ops.attend(
        q * 2, k, v, slots, history, table, positions, pages, sinks, tables, geometry, None, 0.2,
        0.0, 0, False, form,
    )  # fmt: skip
    return output.flatten(2) + 1, lse


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_compiles_without_a_graph_break() -> None:
    spec, plan = CodecSpec(3, 3), make_plan(32, ref.half_rope(32, 32))
    plain, traced = (Harness(plan, spec, batch=2) for _ in range(2))
    form = str(plain.constants.layout)
    given = [arguments(harness) for harness in (plain, traced)]
    expected = layer(form, *given[0])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(form, *given[1]), expected)
    ours, theirs = (harness.cache.layers[0] for harness in (plain, traced))
    assert torch.equal(torch.cat(ours.slabs), torch.cat(theirs.slabs))
    assert torch.equal(ours.sinks, theirs.sinks)


def test_opcheck_traces_with_dynamic_shapes() -> None:
    harness = Harness(make_plan(32, ref.half_rope(32, 32)), CodecSpec(3, 3), batch=2)
    form = str(harness.constants.layout)
    q, k, v, slots, history, table, positions, *cache = arguments(harness)
    tests = "test_aot_dispatch_dynamic"
    torch.library.opcheck(ops.append, (k, v, slots, table, *cache, form), test_utils=tests)
    torch.library.opcheck(
        ops.attend,
        (q, k, v, slots, history, table, positions, *cache, None, 0.2, 0.0, 0, True, form),
        test_utils=tests,
    )


def test_autocast_changes_no_byte() -> None:
    spec, plan = CodecSpec(3, 3), make_plan(32, ref.half_rope(32, 32))
    plain, mixed = (Harness(plan, spec, batch=2) for _ in range(2))
    expected = layer(str(plain.constants.layout), *arguments(plain))
    given = arguments(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(str(plain.constants.layout), *given)
    assert all(map(torch.equal, got, expected))
    assert torch.equal(plain.cache.layers[0].slabs[0], mixed.cache.layers[0].slabs[0])
