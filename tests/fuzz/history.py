"""What a cache should hold, told in lists: columns of rows, each of which knows its step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Column:
    """One column of one row.

    Attributes:
        token: its id.
        position: RoPE position.
        real: no padding.
        step: number of the step that it came with.
        hidden: which tokens of the row (counted without padding) that step's mask left out.
    """

    token: int
    position: int
    real: bool
    step: int
    hidden: frozenset[int]


@dataclass
class Row:
    """The columns of a row, and which of its tokens the last mask left out."""

    columns: list[Column] = field(default_factory=list)
    hidden: frozenset[int] = frozenset()

    @property
    def tokens(self) -> list[Column]:
        """The columns that are no padding, in order of their slots."""
        return [column for column in self.columns if column.real]

    def mask(self) -> list[bool]:
        """Which columns are seen."""
        slot, seen = itertools.count(), []
        for column in self.columns:
            seen.append(column.real and next(slot) not in self.hidden)
        return seen

    def steps(self) -> Iterator[list[Column]]:
        """The row's tokens by the step that brought them."""
        for _, group in itertools.groupby(self.tokens, key=lambda column: column.step):
            yield list(group)

    def copied(self) -> Row:
        return Row(list(self.columns), self.hidden)


class History:
    """The rows of a cache."""

    _steps = itertools.count()

    def __init__(self, rows: int) -> None:
        self.rows = [Row() for _ in range(rows)]

    @property
    def columns(self) -> int:
        return len(self.rows[0].columns)

    @property
    def padded(self) -> bool:
        """Whether any column is padding."""
        return any(not column.real for row in self.rows for column in row.columns)

    def hide(self, flips: Sequence[tuple[int, int]]) -> None:
        """Flip whether token ``slot`` of a row is hidden, for those that exist."""
        for index, slot in flips:
            row = self.rows[index % len(self.rows)]
            if slot < len(row.tokens):
                row.hidden ^= {slot}

    def show_all(self) -> None:
        """Nothing is hidden any more."""
        for row in self.rows:
            row.hidden = frozenset()

    def append(self, ids: Tensor, real: Sequence[Sequence[bool]], parts: int) -> Tensor:
        """Add a step's columns, cut into steps of ``parts`` tokens at most.

        Returns:
            Their positions, int64 [rows, S]: how many tokens are seen before.
        """
        number = [next(self._steps) for _ in range(-(-ids.shape[1] // parts))]
        positions = torch.zeros_like(ids)
        for i, row in enumerate(self.rows):
            position = sum(row.mask())
            for j, token in enumerate(ids[i].tolist()):
                positions[i, j] = position if real[i][j] else 0
                row.columns.append(
                    Column(token, position, real[i][j], number[j // parts], row.hidden)
                )
                position += real[i][j]
        return positions

    def crop(self, count: int) -> None:
        for row in self.rows:
            del row.columns[len(row.columns) - count :]
            row.hidden = frozenset(slot for slot in row.hidden if slot < len(row.tokens))

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[i].copied() for i in rows]

    def copied(self) -> History:
        other = History(0)
        other.rows = [row.copied() for row in self.rows]
        return other

    def mask(self) -> Tensor:
        """int64 [rows, columns], nonzero for tokens that are seen."""
        return torch.tensor([row.mask() for row in self.rows]).long().view(len(self.rows), -1)
