"""append and attend against the reference: every layout feature, ragged, in pieces, at once."""

from __future__ import annotations

import pytest
import torch

from kvquant_compile.codec.keys import dequantise_keys
from kvquant_compile.codec.layout import lossless_spec, unpack_keys, unpack_values
from kvquant_compile.codec.spec import CodecSpec, LayerTables
from kvquant_compile.codec.values import dequantise_values
from kvquant_compile.lowering import ops
from kvquant_compile.lowering.constants import LayerConstants, lower_layer
from kvquant_compile.lowering.pages import gather_pages
from kvquant_compile.lowering.read import read_keys, read_values
from kvquant_compile.plan import AttendPlan, LayerPlan, RopeSpec
from kvquant_compile.runtime.cache import QuantizedCache
from tests.lowering import reference as ref

CPU = torch.device("cpu")


def make_plan(
    dim: int, rope: RopeSpec | None, heads: int = 2, rep: int = 3, **site: float
) -> LayerPlan:
    return LayerPlan(0, heads, dim, dim, rope, (AttendPlan(heads * rep, dim**-0.5, **site),))


class Harness:
    """One layer, driven as the rewritten graph drives it, and its reference."""

    def __init__(self, plan: LayerPlan, spec: CodecSpec, batch: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.plan, self.spec = plan, spec
        dims = plan.kv_heads, plan.key_dim, plan.value_dim
        self.tables = None if spec.lossless else ref.uniform_tables(spec, *dims)
        self.constants: LayerConstants = lower_layer(plan, spec, self.tables, torch.float32, CPU)
        self.cache = QuantizedCache([self.constants.layout], torch.float32, CPU)
        self.tokens: list[list] = [[] for _ in range(batch)]

    def step(self, steps: int, exact: bool, mask: torch.Tensor | None = None) -> tuple:
        """Random tokens through the ops; returns (output, lse, expected output, lse, real)."""
        plan, batch = self.plan, len(self.tokens)
        heads = plan.attends[0].query_heads
        k = torch.randn(batch, plan.kv_heads, steps, plan.key_dim)
        v = torch.randn(batch, plan.kv_heads, steps, plan.value_dim)
        q = torch.randn(batch, heads, steps, plan.key_dim)
        real = torch.ones(batch, steps, dtype=torch.bool)
        if mask is not None:
            real = mask[:, -steps:].bool()
        positions = (real.cumsum(1) - 1).clamp(min=0)
        if self.cache.batch:
            positions = positions + self.cache.lengths[:, None]
        step = self.cache.begin(positions, mask)
        layer = self.cache.layers[0]
        tables, geometry = self.constants.arguments()
        rotated = ref.rotate(k, positions, plan.rope)
        common = (self.cache.table, layer.slabs, layer.sinks, tables, geometry)
        ops.append(k, v, step.slots, *common, str(self.constants.layout))
        site = plan.attends[0]
        output, lse = ops.attend(
            q, rotated, v, step.slots, step.history, self.cache.table, self.cache.positions,
            layer.slabs, layer.sinks, tables, geometry, None, site.scale, site.softcap,
            site.window, exact, str(self.constants.layout))  # fmt: skip
        expected, expected_lse = self._expected(q, k, v, positions, real, exact)
        self.cache.commit(step)
        return output, lse, expected, expected_lse, real

    def _expected(self, q, k, v, positions, real, exact):
        outputs, lses = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).double(), None
        lses = torch.full(q.shape[:3], -torch.inf).double()
        window = self.plan.attends[0].window
        for b in range(q.shape[0]):
            before = len(self.tokens[b])
            for s in real[b].nonzero().flatten().tolist():
                self.tokens[b].append((k[b, :, s], v[b, :, s], int(positions[b, s])))
            if not self.tokens[b]:
                continue
            raw_k, raw_v = (torch.stack([t[i] for t in self.tokens[b]], 1)[None] for i in (0, 1))
            where = torch.tensor([[t[2] for t in self.tokens[b]]])
            keys, values = ref.stored(raw_k, raw_v, self.tables, self.spec)
            if exact:
                keys = torch.cat([keys[:, :, :before], raw_k[:, :, before:]], 2)
                values = torch.cat([values[:, :, :before], raw_v[:, :, before:]], 2)
            keys = ref.rotate(keys, where, self.plan.rope)
            place = torch.arange(before, len(self.tokens[b]))[:, None]
            other = torch.arange(len(self.tokens[b]))
            seen = other <= place
            if window:
                seen &= other > place - window
            mine = real[b]
            o, lse = ref.attention(q[b : b + 1, :, mine], keys, values, seen[None], self.plan)
            outputs[b, mine], lses[b][:, mine] = o[0], lse[0]
        return outputs, lses


def assert_matches(result: tuple, tolerance: float = 2e-5) -> None:
    output, lse, expected, expected_lse, real = result
    assert torch.isfinite(output).all()
    error = (output.double() - expected)[real].norm() / expected[real].norm()
    assert error < tolerance, f"relative error {error:.2e}"
    mask = real[:, None].expand_as(lse)
    torch.testing.assert_close(lse.double()[mask], expected_lse[mask], rtol=1e-4, atol=1e-4)


GEOMETRIES = {
    "half128": (128, ref.half_rope(128, 128)),
    "half64": (64, ref.half_rope(64, 64)),
    "half80": (80, ref.half_rope(80, 80)),
    "half8": (8, ref.half_rope(8, 8)),
    "partial96of24": (96, ref.half_rope(96, 24)),
    "interleaved64": (64, ref.interleaved_rope(64)),
    "none48": (48, None),
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry(name: str, exact: bool) -> None:
    dim, rope = GEOMETRIES[name]
    harness = Harness(make_plan(dim, rope), CodecSpec(3, 3), batch=2)
    for steps in (5, 1, 130, 1, 1):
        assert_matches(harness.step(steps, exact))


@pytest.mark.parametrize(
    "spec",
    [CodecSpec(k, v, ks, vs, False, sink)
     for k, v, ks, vs, sink in [(1, 1, 0, 0, 0), (2, 2, 1, 1, 1), (4, 2, 2, 0, 4), (2, 4, 0, 3, 0),
                                (5, 6, 1, 1, 1), (7, 8, 1, 1, 1), (8, 5, 4, 4, 2)]]
    + [lossless_spec()],
    ids=str,
)  # fmt: skip
def test_every_width_and_slot_count(spec: CodecSpec) -> None:
    harness = Harness(make_plan(32, ref.half_rope(32, 32)), spec, batch=1)
    for steps in (63, 1, 1, 70):
        assert_matches(harness.step(steps, exact=False))


@pytest.mark.parametrize("site", [{"window": 9}, {"softcap": 1.5}, {"window": 70, "softcap": 3.0}])
@pytest.mark.parametrize("exact", [True, False])
def test_window_and_softcap(site: dict, exact: bool) -> None:
    plan = make_plan(32, ref.half_rope(32, 32), **site)
    harness = Harness(plan, CodecSpec(4, 4), batch=2)
    for steps in (20, 1, 100, 1, 3):
        assert_matches(harness.step(steps, exact))


@pytest.mark.parametrize("exact", [True, False])
def test_left_padding_and_ragged_rows(exact: bool) -> None:
    harness = Harness(make_plan(32, ref.half_rope(32, 32)), CodecSpec(3, 3, sink_tokens=2), batch=3)
    padding, done = (0, 66, 129), 0
    for steps in (130, 1, 40):
        mask = torch.ones(3, done + steps, dtype=torch.long)
        for row, count in enumerate(padding):
            mask[row, :count] = 0
        assert_matches(harness.step(steps, exact, mask))
        done += steps


def test_many_slabs_and_long_history_blocks() -> None:
    harness = Harness(
        make_plan(16, ref.half_rope(16, 16), heads=1, rep=1), CodecSpec(2, 2), batch=2
    )
    for steps in (1100, 64, 64, 700, 1):
        assert_matches(harness.step(steps, exact=False))
    assert len(harness.cache.layers[0].slabs) > 2


def test_one_by_one_equals_at_once() -> None:
    spec, plan = CodecSpec(3, 3), make_plan(32, ref.half_rope(32, 32))
    together, single = Harness(plan, spec, batch=1), Harness(plan, spec, batch=1)
    k, v = torch.randn(1, 2, 150, 32), torch.randn(1, 2, 150, 32)
    for harness, sizes in ((together, [150]), (single, [1] * 150)):
        at = 0
        for size in sizes:
            step = harness.cache.begin(torch.arange(at, at + size)[None], None)
            layer = harness.cache.layers[0]
            tables, geometry = together.constants.arguments()
            ops.append(k[:, :, at : at + size], v[:, :, at : at + size], step.slots,
                       harness.cache.table, layer.slabs, layer.sinks, tables, geometry,
                       str(together.constants.layout))  # fmt: skip
            harness.cache.commit(step)
            at += size
    pages = [torch.cat(h.cache.layers[0].slabs)[:3] for h in (together, single)]
    assert torch.equal(*pages)
    assert torch.equal(together.cache.layers[0].sinks, single.cache.layers[0].sinks)


def test_opcheck() -> None:
    harness = Harness(make_plan(32, ref.half_rope(32, 32)), CodecSpec(3, 3), batch=2)
    harness.step(40, exact=True)
    step = harness.cache.begin(torch.arange(40, 45).expand(2, 5), None)
    cache, layer = harness.cache, harness.cache.layers[0]
    tables, geometry = harness.constants.arguments()
    text = str(harness.constants.layout)
    k, q = torch.randn(2, 2, 5, 32), torch.randn(2, 6, 5, 32)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (cache.table, layer.slabs, layer.sinks, tables, geometry, text)
    torch.library.opcheck(ops.append, (k, k, step.slots, *arguments), test_utils=tests)
    torch.library.opcheck(
        ops.attend, (q, k, k, step.slots, step.history, cache.table, cache.positions, layer.slabs,
                     layer.sinks, tables, geometry, None, 0.2, 0.0, 0, True, text),
        test_utils=tests)  # fmt: skip


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [16, 48, 80, 128])
def test_direct_reading_gives_the_codecs_own_bits(bits: int, dim: int) -> None:
    spec = CodecSpec(bits, bits, 2, 1, True, 0)
    harness = Harness(make_plan(dim, None), spec, batch=2)
    harness.step(150, exact=True)
    layer, layout = harness.cache.pages[0], harness.constants.layout
    raw = gather_pages(layer.slabs, harness.cache.table.long())
    tables = LayerTables(*harness.constants.tables)
    keys = dequantise_keys(unpack_keys(layout, raw), tables, spec)
    values = dequantise_values(unpack_values(layout, raw), tables, spec)
    assert torch.equal(read_keys(layout, raw, tables), keys)
    assert torch.equal(read_values(layout, raw, tables), values)
