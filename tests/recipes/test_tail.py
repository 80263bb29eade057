"""The cache under appends and crops in any order: no token is ever another one."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.algebra import Sample
from kvquant_compile.lowering import ops
from kvquant_compile.lowering.attend import CacheView, read_block
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.plan import AttendPlan, LayerPlan
from kvquant_compile.recipes import Affine, Recipe, Tail
from kvquant_compile.runtime.cache import QuantizedCache

# Fine enough that a token, packed once or several times, is nearer to itself than to any other.
FINE = Recipe(
    "fine",
    Affine(8, "channel", 16),
    Affine(8),
    sinks=2,
    key_tail=Tail(recent=5, flush=32),
    value_tail=Tail(recent=20),
)
PLAN = LayerPlan(0, 1, 16, 16, None, (AttendPlan(1, 1.0),))
TOKENS = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
STEPS = st.lists(st.integers(-90, 140).filter(bool), min_size=1, max_size=12)


class Driven:
    """One cache layer and what it should hold."""

    def __init__(self, dtype: torch.dtype) -> None:
        sample = Sample(TOKENS[None])
        tables = FINE.fit(sample, sample)
        self.constants = lower_layer(PLAN, FINE, tables, dtype, torch.device("cpu"))
        self.cache = QuantizedCache([self.constants.layout], dtype, torch.device("cpu"))
        self.held: list[int] = []
        self.next, self.dtype = 0, dtype

    def append(self, count: int, commit: bool = True) -> None:
        ids = list(range(self.next, self.next + count))
        self.next += count
        x = TOKENS[ids].to(self.dtype)[None, None]
        start = len(self.held)
        step = self.cache.begin(torch.arange(start, start + count)[None], None)
        layer, (tables, geometry) = self.cache.pages[0], self.constants.arguments()
        arguments = (self.cache.table, layer.slabs, layer.sinks, tables, geometry)
        ops.append(x, x, step.slots, *arguments, str(self.constants.layout))
        if commit:
            self.cache.commit(step)
            self.held += ids

    def crop(self, count: int) -> None:
        count = min(count, len(self.held))
        if count:
            self.cache.crop(-count)
            del self.held[-count:]

    def check(self) -> None:
        count = len(self.held)
        if not count:
            return
        layer = self.cache.pages[0]
        arguments = (*self.constants.arguments(), str(self.constants.layout))
        cache = self.cache
        view = CacheView(cache.table, cache.positions, layer.slabs, layer.sinks, *arguments)
        read = read_block(view, 0, -(-count // 64), cache.lengths, self.dtype)
        for x in read:
            error = (x[0, 0, :count].float() - TOKENS[self.held]).abs().max()
            assert error < 0.06, (
                f"token {(x[0, 0, :count] - TOKENS[self.held]).abs().argmax() // 16}"
            )


@given(STEPS, st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
@example([150, -50, 1], torch.float32)  # behind the ring, then one token
@example([150, -10, 5, -30, 100], torch.float32)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_every_token_is_read_as_itself(steps: list[int], dtype: torch.dtype) -> None:
    driven = Driven(dtype)
    for step in steps:
        if step > 0:
            driven.append(step)
        else:
            driven.crop(-step)
        driven.check()


@given(st.lists(st.tuples(st.integers(1, 100), st.booleans()), min_size=2, max_size=8))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_steps_that_fail_change_no_token(steps: list[tuple[int, bool]]) -> None:
    driven = Driven(torch.float32)
    for count, commit in steps:
        driven.append(count, commit)
        driven.check()
