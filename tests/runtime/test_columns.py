"""Random histories of a cache against the plainest bookkeeping: lists of columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.layout import PageLayout, lossless_spec
from kvquant_compile.errors import CacheError
from kvquant_compile.runtime.cache import QuantizedCache

CPU = torch.device("cpu")
ROWS = 3


@dataclass(frozen=True)
class Column:
    """One column of one row: a token's position, or padding."""

    real: bool
    position: int
    hidden: bool = False


class Plain:
    """A cache and the same history in lists."""

    def __init__(self) -> None:
        layout = PageLayout(lossless_spec(), 1, 16, 16, 4)
        self.cache = QuantizedCache([layout], torch.float32, CPU)
        self.rows: list[list[Column]] = [[] for _ in range(ROWS)]
        self.next = 0

    def step(self, new: list[list[bool]], flips: list[tuple[int, int]], masked: bool) -> None:
        """Append columns, ``new[row]`` real or padding; flip what the mask shows of old ones."""
        steps = len(new[0])
        old = [list(row) for row in self.rows]
        for row, column in flips if masked else []:
            if column < len(old[row]) and old[row][column].real:
                old[row][column] = replace(old[row][column], hidden=not old[row][column].hidden)
        positions = torch.arange(self.next, self.next + steps).expand(ROWS, steps)
        mask = None
        if masked:
            shown = [[c.real and not c.hidden for c in row] for row in old]
            mask = torch.tensor([a + b for a, b in zip(shown, new, strict=True)]).long()
        else:
            new = [[True] * steps] * ROWS
            old = [[replace(column, hidden=False) for column in row] for row in old]
        step = self.cache.begin(positions, mask)
        real = torch.tensor(new)
        assert torch.equal(step.slots >= 0, real)
        self.cache.commit(step)
        for i, row in enumerate(old):
            row += [Column(r, self.next + j) for j, r in enumerate(new[i])]
        self.rows, self.next = old, self.next + steps

    def crop(self, count: int) -> None:
        count = min(count, self.cache.columns)
        self.cache.crop(-count)
        self.rows = [row[: len(row) - count] for row in self.rows]

    def reorder(self, order: list[int]) -> None:
        self.cache.reorder_cache(torch.tensor(order))
        self.rows = [list(self.rows[i]) for i in order]

    def check(self) -> None:
        """Lengths and positions are what the lists say."""
        assert self.cache.columns == len(self.rows[0])
        for i, row in enumerate(self.rows):
            stored = [c for c in row if c.real]
            assert int(self.cache.lengths[i]) == len(stored)
            expected = [-1 - c.position if c.hidden else c.position for c in stored]
            assert self.cache.positions[i, : len(stored)].tolist() == expected


def columns(steps: int) -> st.SearchStrategy[list[list[bool]]]:
    one = st.lists(st.booleans(), min_size=steps, max_size=steps)
    return st.lists(one, min_size=ROWS, max_size=ROWS)


flips = st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, 9)), max_size=3)
padded = st.integers(1, 5).flatmap(lambda n: st.tuples(columns(n), flips, st.just(True)))
decode = st.tuples(st.just([[True]] * ROWS), st.just([]), st.booleans())
moves = st.one_of(
    st.tuples(st.just("step"), padded),
    st.tuples(st.just("step"), decode),
    st.tuples(st.just("crop"), st.tuples(st.integers(0, 6))),
    st.tuples(st.just("reorder"), st.tuples(st.lists(st.integers(0, ROWS - 1), min_size=ROWS,
                                                     max_size=ROWS))),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(moves, min_size=1, max_size=10))
def test_any_history(history: list[tuple[str, tuple]]) -> None:
    plain = Plain()
    plain.step([[True, True]] * ROWS, [], True)
    for name, arguments in history:
        getattr(plain, name)(*arguments)
        plain.check()


@given(st.integers(1, 150), st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_padding_stays_known_while_the_cache_grows(steps: int, row: int) -> None:
    plain = Plain()
    start = [[i != row, True] for i in range(ROWS)]
    plain.step(start, [], True)
    for i in range(steps):
        plain.step([[True]] * ROWS, [], bool(i % 2))
    plain.check()
    assert plain.cache.masks.shown is plain.cache.masks.stored
    mask = torch.ones(ROWS, plain.cache.columns + 1)
    with pytest.raises(CacheError, match="contradicts"):
        plain.cache.begin(torch.zeros(ROWS, 1), mask)


def test_reserving_is_bounded_and_used() -> None:
    plain = Plain()
    plain.cache.reserve(5000)
    plain.step([[True]] * ROWS, [], False)
    assert plain.cache.table.shape[1] * 64 == 1088  # 1 + 1024, in whole pages
    plain.cache.reserve(1100)
    plain.step([[True] * 1090] * ROWS, [], False)
    assert plain.cache.table.shape[1] * 64 == 1152
    storage = plain.cache.storage
    plain.step([[True]] * ROWS, [], False)
    assert plain.cache.storage is storage
    plain.check()
