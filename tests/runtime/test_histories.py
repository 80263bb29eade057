"""Caches that were forked from one another hold what they were told, whatever happens to them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.layout import PageLayout, lossless_spec
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.append import append
from kvquant_compile.lowering.pages import gather_pages
from kvquant_compile.runtime.cache import QuantizedCache

CPU = torch.device("cpu")
ROPELESS = [torch.arange(16), torch.arange(16), torch.empty(0), torch.empty(0)]


class Told:
    """A cache with one lossless layer, and what its sequences should hold, in lists."""

    def __init__(self) -> None:
        self.layout = PageLayout(lossless_spec(), 1, 16, 16, 4)
        self.cache = QuantizedCache([self.layout], torch.float32, CPU)
        self.rows: list[list[float]] = []

    def step(self, new: list[list[float | None]]) -> None:
        """Append a column to every sequence; None for padding."""
        real = torch.tensor([[x is not None for x in row] for row in new])
        self.rows = self.rows or [[] for _ in new]
        # Padding stays where it is: what was cached has a mask of its own by now.
        stored = self.cache.masks.stored
        known = torch.ones(len(new), self.cache.columns, dtype=torch.bool)
        known = known if stored is None else stored[:, : self.cache.columns]
        step = self.cache.begin(torch.zeros_like(real).long(), torch.cat([known, real], 1).long())
        value = torch.tensor([[x or 0.0 for x in row] for row in new])
        tensor = value[:, None, :, None].expand(-1, 1, -1, 16)
        layer = self.cache.pages[0]
        append(
            tensor, tensor, step.slots, self.cache.table, layer.slabs, layer.sinks, [], ROPELESS,
            str(self.layout),
        )  # fmt: skip
        self.cache.commit(step)
        for row, columns in zip(self.rows, new, strict=True):
            row += [x for x in columns if x is not None]

    def check(self) -> None:
        """Every sequence holds what it was told, and may write on on pages of its own."""
        assert self.cache.lengths.tolist() == [len(row) for row in self.rows]
        for i, row in enumerate(self.rows):
            if row:
                used = -(-len(row) // PAGE_TOKENS)
                ids = self.cache.table[i : i + 1, :used].long()
                pages = gather_pages(self.cache.pages[0].slabs, ids)
                values = pages[0, 0].view(torch.float32).view(used, 2, PAGE_TOKENS, 16)
                assert values[:, 1, :, 3].flatten()[: len(row)].tolist() == row


class History:
    """Caches that were forked from one another, at most three at a time."""

    def __init__(self) -> None:
        self.told, self.counter = [Told()], 0

    def step(self, which: int, steps: int, padded: int) -> None:
        """Columns of new numbers; ``padded`` has the rows whose first half is padding."""
        told = self.told[which % len(self.told)]
        new: list[list[float | None]] = []
        for row in range(len(told.rows) or 2):
            hidden = steps // 2 if padded >> row & 1 else 0
            self.counter += steps
            fresh = [float(self.counter + i) for i in range(steps)]
            new.append([None] * hidden + fresh[hidden:])
        told.step(new)

    def crop(self, which: int, count: int) -> None:
        told = self.told[which % len(self.told)]
        before = told.cache.lengths.tolist()
        told.cache.crop(-min(count, told.cache.columns))
        lost = [b - a for b, a in zip(before, told.cache.lengths.tolist(), strict=True)]
        told.rows = [row[: len(row) - n] for row, n in zip(told.rows, lost, strict=True)]

    def select(self, which: int, order: list[int]) -> None:
        told = self.told[which % len(self.told)]
        if told.rows:
            order = [i % len(told.rows) for i in order]
            told.cache.batch_select_indices(torch.tensor(order))
            told.rows = [list(told.rows[i]) for i in order]

    def fork(self, which: int, count: int) -> None:
        told = self.told[which % len(self.told)]
        other = Told()
        other.cache = told.cache.fork(count)
        other.rows = [list(row) for row in told.rows for _ in range(count)]
        self.told = [*self.told, other][-3:]

    def drop(self, which: int) -> None:
        if len(self.told) > 1:
            self.told.pop(which % len(self.told)).cache.reset()


which = st.integers(0, 2)
moves = st.one_of(
    st.tuples(st.just("step"), which, st.integers(1, 90), st.sampled_from([0, 0, 0, 1, 2, 5])),
    st.tuples(st.just("crop"), which, st.integers(0, 100)),
    st.tuples(st.just("select"), which, st.lists(st.integers(0, 5), min_size=1, max_size=4)),
    st.tuples(st.just("fork"), which, st.integers(1, 2)),
    st.tuples(st.just("drop"), which),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(moves, min_size=1, max_size=14))
def test_any_history(events: list[tuple]) -> None:
    history = History()
    history.step(0, 100, 0)
    for name, *arguments in events:
        getattr(history, name)(*arguments)
        for told in history.told:
            told.check()
