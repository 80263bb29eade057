"""Exact last tokens: the ops against a dense reference that keeps a naive ring of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering import attend as torch_path
from kvquant_compile.lowering import ops
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.lowering.recent import keep_exact, ring_slots, ring_span
from kvquant_compile.plan import AttendPlan, LayerPlan
from kvquant_compile.runtime.cache import QuantizedCache
from tests.lowering import reference as ref

CPU = torch.device("cpu")
DIM, HEADS, REP = 16, 2, 2


class Row:
    """A sequence's tokens, and which of them a ring holds: slot by row of the ring."""

    def __init__(self, ring: int) -> None:
        self.size = ring
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.ring: dict[int, int] = {}

    def append(self, key: Tensor, value: Tensor) -> None:
        slot = len(self.keys)
        self.keys.append(key)
        self.values.append(value)
        self.ring[slot % self.size] = slot

    def crop(self, count: int) -> None:
        del self.keys[len(self.keys) - count :], self.values[len(self.values) - count :]

    def holds(self, slot: int) -> bool:
        return self.ring.get(slot % self.size) == slot


class Harness:
    """One layer through the ops, and what it should give."""

    def __init__(self, spec: CodecSpec, batch: int, rope: bool = True, **site: float) -> None:
        turned = ref.half_rope(DIM, DIM) if rope else None
        sites = (AttendPlan(HEADS * REP, DIM**-0.5, **site),)
        self.plan, self.spec = LayerPlan(0, HEADS, DIM, DIM, turned, sites), spec
        self.tables = ref.uniform_tables(spec, HEADS, DIM, DIM)
        self.constants = lower_layer(self.plan, spec, self.tables, torch.float32, CPU)
        self.cache = QuantizedCache([self.constants.layout], torch.float32, CPU)
        self.rows = [Row(spec.recent_tokens) for _ in range(batch)]

    def step(self, steps: int, exact: bool, padding: tuple[int, ...] = (), fails: bool = False):
        """Random tokens; row i starts with ``padding[i]`` padded columns."""
        batch = len(self.rows)
        k, v = torch.randn(2, batch, HEADS, steps, DIM).unbind()
        q = torch.randn(batch, HEADS * REP, steps, DIM)
        real = torch.ones(batch, steps, dtype=torch.bool)
        for row, count in enumerate(padding):
            real[row, :count] = False
        positions = (real.cumsum(1) - 1).clamp(min=0)
        if self.cache.batch:
            positions = positions + self.cache.lengths[:, None]
        mask = self._mask(real)
        step = self.cache.begin(positions, mask)
        layer, site = self.cache.pages[0], self.plan.attends[0]
        constants, text = self.constants.arguments(), str(self.constants.layout)
        stored = (self.cache.table, layer.slabs, layer.sinks, *constants)
        ops.append(k, v, step.slots, *stored, text)
        if fails:
            return
        output, lse = ops.attend(
            q, ref.rotate(k, positions, self.plan.rope), v, step.slots, step.history, stored[0],
            self.cache.positions, *stored[1:], None, site.scale, site.softcap, site.window, exact,
            text)  # fmt: skip
        for b in range(batch):
            mine = real[b]
            if not bool(mine.any()):
                continue
            before = len(self.rows[b].keys)
            for s in mine.nonzero().flatten().tolist():
                self.rows[b].append(k[b, :, s], v[b, :, s])
            want, want_lse = self._expected(self.rows[b], q[b : b + 1, :, mine], before, exact)
            got = output[b, mine].double()
            assert float((got - want).norm() / want.norm()) < 3e-5
            torch.testing.assert_close(lse[b][:, mine].double(), want_lse, rtol=1e-4, atol=1e-4)
        assert bool((output[~real] == 0).all())
        self.cache.commit(step)

    def _mask(self, real: Tensor) -> Tensor | None:
        stored = self.cache.masks.stored
        if stored is None and bool(real.all()):
            return None
        done = self.cache.columns
        before = torch.ones(len(real), done, dtype=torch.bool)
        if stored is not None:
            before = stored[:, :done]
        return torch.cat([before, real], 1).long()

    def _expected(self, row: Row, q: Tensor, before: int, exact: bool) -> tuple[Tensor, Tensor]:
        """Every query by itself: a token is exact, or what its page holds."""
        raw = [torch.stack(x, 1)[None] for x in (row.keys, row.values)]
        packed = ref.stored(*raw, self.tables, self.spec)
        count, steps = len(row.keys), q.shape[2]
        where, window = torch.arange(count), self.plan.attends[0].window
        outputs, lses = [], []
        # As one token after another would: few tokens always see each other exactly.
        exact = exact or steps <= self.spec.recent_tokens
        for i in range(steps):
            slot = before + i
            known = torch.tensor([
                (t >= before and (exact or t > slot - self.spec.recent_tokens))
                or (t < before and row.holds(t))
                for t in range(count)
            ])  # fmt: skip
            k, v = (torch.where(known[:, None], x, y) for x, y in zip(raw, packed, strict=True))
            seen = where <= slot
            if window:
                seen &= where > slot - window
            k = ref.rotate(k, where[None], self.plan.rope)
            o, lse = ref.attention(q[:, :, i : i + 1], k, v, seen[None, None], self.plan)
            outputs.append(o[0, 0])
            lses.append(lse[0, :, 0])
        return torch.stack(outputs), torch.stack(lses, 1)

    def crop(self, count: int) -> None:
        self.cache.crop(-count)
        for row in self.rows:
            row.crop(count)


def recent(tokens: int, sinks: int = 1, **options: int) -> CodecSpec:
    return CodecSpec(2, 3, 1, 1, True, sinks, tokens, **options)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("site", [{}, {"window": 9}, {"window": 70}, {"softcap": 1.5}], ids=str)
def test_steps_of_every_length(site: dict, exact: bool) -> None:
    torch.manual_seed(0)
    harness = Harness(recent(16), 2, **site)
    for steps in (5, 1, 1, 130, 16, 17, 1, 3, 40):
        harness.step(steps, exact)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from([16, 48]),
    st.sampled_from([0, 1, 20]),
    st.booleans(),
    st.lists(
        st.tuples(
            st.sampled_from([1, 1, 2, 15, 16, 17, 50, 70]),
            st.booleans(),
            st.integers(0, 60),
            st.booleans(),
        ),
        min_size=2,
        max_size=6,
    ),
)
def test_crops_and_failures_in_any_order(ring: int, sinks: int, rope: bool, history: list) -> None:
    torch.manual_seed(1)
    harness = Harness(recent(ring, sinks), 1, rope)
    for steps, exact, dropped, fails in history:
        harness.step(steps, exact)
        harness.crop(min(dropped, len(harness.rows[0].keys)))
        if fails:
            harness.step(3, exact, fails=True)
            for slot in range(len(harness.rows[0].keys), len(harness.rows[0].keys) + 3):
                harness.rows[0].ring[slot % ring] = -1  # overwritten


@pytest.mark.parametrize("exact", [True, False])
def test_ragged_rows(exact: bool) -> None:
    torch.manual_seed(2)
    harness = Harness(recent(16, 2), 3)
    for steps, padding in ((100, (0, 60, 90)), (1, ()), (20, (19, 0, 3)), (1, ()), (2, (1, 2, 0))):
        harness.step(steps, exact, padding)


def test_rows_take_their_ring_along() -> None:
    torch.manual_seed(3)
    harness = Harness(recent(16), 2)
    harness.step(70, True, (0, 20))
    harness.cache.batch_select_indices(torch.tensor([1, 1, 0]))
    old = harness.rows
    harness.rows = [Row(16) for _ in range(3)]
    for row, source in zip(harness.rows, (old[1], old[1], old[0]), strict=True):
        row.keys, row.values = list(source.keys), list(source.values)
        row.ring = dict(source.ring)
    harness.step(1, True)
    other = harness.cache.fork()
    harness.step(5, True)
    rings = [ring_span(cache.pages[0].sinks)[1].tolist() for cache in (other, harness.cache)]
    assert rings == [[51, 51, 71], [56, 56, 76]]


def test_a_ring_as_long_as_the_text_is_attention_itself() -> None:
    """With every token in the ring nothing of the pages is left, in any mode."""
    torch.manual_seed(4)
    harness = Harness(recent(64, 0), 1)
    for steps, exact in ((30, True), (1, False), (20, False), (13, True)):
        harness.step(steps, exact)
        layer = harness.cache.pages[0]
        for name in ("key_token_scale", "value_scale_zero"):
            harness.constants.layout.split(layer.slabs[0], name).fill_(0x7E)  # NaN
    assert ring_slots(layer.sinks, 64).tolist() == [list(range(64))]


def test_the_ring_keeps_what_it_has_not_overwritten() -> None:
    sinks = torch.zeros(1, 1, 16 + 1, 4, dtype=torch.bfloat16)
    for first, end in ((0, 40), (20, 24)):  # cropped from 40 to 20 tokens in between
        slots = torch.arange(first, end)[None]
        tokens = slots[..., None].expand(1, end - first, 4)[:, None].bfloat16()
        keep_exact(sinks, tokens, slots, 0, 16)
    # of the tokens 24 .. 39 that were there none is left
    assert [x.tolist() for x in ring_span(sinks)] == [[20], [24]]
    held = ring_slots(sinks, 16)
    assert sorted(held[held >= 0].tolist()) == [20, 21, 22, 23]
    assert torch.equal(sinks[0, 0, :16, 0][held[0] >= 0], held[held >= 0].bfloat16())


def test_format_strings() -> None:
    plain, ringed = (PageLayout(recent(r), 2, 64, 64, 2) for r in (0, 64))
    assert str(plain) == "k2v3 slots1/1 scale1 sink1 heads2 dim64/64 raw2"
    assert str(ringed) == f"{plain} recent64"
    assert PageLayout.parse(str(ringed)) == ringed
    assert PageLayout.parse(str(plain)) == plain
    assert (plain.page_bytes, plain.exact_rows) == (ringed.page_bytes, 1)
    assert ringed.exact_rows == 1 + 64 + 1


def test_fewer_keys_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    monkeypatch.setattr(torch_path, "QUERY_TILE", 7)
    Harness(recent(16), 1).step(60, False)
