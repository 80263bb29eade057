"""Instructions of a whole warp: what lanes get of each other, matrix products included.

Each takes the sources' lanes and gives the targets' lanes; registers of matrix fragments are
spread over lanes as PTX defines (g = lane / 4, t = lane % 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.gluon.ptx.operands import WARP, Lanes

LANE = np.arange(WARP)
G, T = LANE // 4, LANE % 4


@dataclass(frozen=True)
class Warpwide:
    """Operand kinds: of targets by count, of sources by kind; vectors count every member."""

    function: Callable[..., list[Lanes]]
    kinds: tuple[str, ...]


def _shuffle_index(x: Lanes, index: Lanes, clamp: Lanes, _members: Lanes) -> list[Lanes]:
    segment = clamp >> 8 & 31
    source = (LANE & segment) | (index & ~segment & 31)
    return [x[source.astype(np.intp)]]


def _shuffle_butterfly(x: Lanes, mask: Lanes, _clamp: Lanes, _members: Lanes) -> list[Lanes]:
    return [x[(LANE ^ mask).astype(np.intp)]]


def _any(x: Lanes, _members: Lanes) -> list[Lanes]:
    return [np.full(WARP, x.any())]


def _all(x: Lanes, _members: Lanes) -> list[Lanes]:
    return [np.full(WARP, x.all())]


def _reduce(x: Lanes, function: Callable[[Lanes], Lanes], dtype: type) -> list[Lanes]:
    return [np.full(WARP, function(x.view(dtype)), dtype).view(np.uint32)]


def _total(x: Lanes) -> Lanes:
    return np.sum(x, dtype=x.dtype)


def _halves(words: Lanes) -> tuple[Lanes, Lanes]:
    both = np.ascontiguousarray(words).view(np.float16).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def product(*words: Lanes) -> list[Lanes]:
    """16x8x16, halves with float32 sums: four words of A, two of B, four of C; four of D."""
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for r in range(4):
        row, column = G + 8 * (r & 1), 2 * T + 8 * (r >> 1)
        a[row, column], a[row, column + 1] = _halves(words[r])
        c[G + 8 * (r >> 1), 2 * T + (r & 1)] = words[6 + r].view(np.float32)
    for r in range(2):
        row = 2 * T + 8 * r
        b[row, G], b[row + 1, G] = _halves(words[4 + r])
    d = (a @ b + c).astype(np.float32)
    return [d[G + 8 * (r >> 1), 2 * T + (r & 1)].view(np.uint32) for r in range(4)]


def byte_product(*words: Lanes) -> list[Lanes]:
    """16x8x32, signed bytes of A times unsigned ones of B, int32 sums."""
    a, b = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
    c = np.zeros((16, 8), np.int64)
    for r in range(4):
        entries = np.ascontiguousarray(words[r]).view(np.int8).reshape(WARP, 4)
        for k in range(4):
            a[G + 8 * (r & 1), 4 * T + k + 16 * (r >> 1)] = entries[:, k]
        c[G + 8 * (r >> 1), 2 * T + (r & 1)] = words[6 + r].view(np.int32)
    for r in range(2):
        entries = np.ascontiguousarray(words[4 + r]).view(np.uint8).reshape(WARP, 4)
        for k in range(4):
            b[4 * T + k + 16 * r, G] = entries[:, k]
    d = (a @ b + c).astype(np.int32)
    return [d[G + 8 * (r >> 1), 2 * T + (r & 1)].view(np.uint32) for r in range(4)]


def fragment_rows(word: Lanes) -> Lanes:
    """An 8x8 matrix of 16-bit numbers from a fragment: row g, columns 2 t and 2 t + 1."""
    return np.ascontiguousarray(word).view(np.uint16).reshape(8, 8)


def rows_fragment(matrix: Lanes) -> Lanes:
    """The fragment of an 8x8 matrix."""
    return np.ascontiguousarray(matrix, np.uint16).reshape(-1).view(np.uint32)


def _transpose(word: Lanes) -> list[Lanes]:
    return [rows_fragment(fragment_rows(word).T)]


_W = "word"
LANES = {
    "shfl.sync.idx.b32": Warpwide(_shuffle_index, (_W,) * 4),
    "shfl.sync.bfly.b32": Warpwide(_shuffle_butterfly, (_W,) * 4),
    "vote.sync.any.pred": Warpwide(_any, ("pred", _W)),
    "vote.sync.all.pred": Warpwide(_all, ("pred", _W)),
    "redux.sync.max.u32": Warpwide(lambda x, _: _reduce(x, np.max, np.uint32), (_W,) * 2),
    "redux.sync.max.s32": Warpwide(lambda x, _: _reduce(x, np.max, np.int32), (_W,) * 2),
    "redux.sync.add.s32": Warpwide(lambda x, _: _reduce(x, _total, np.int32), (_W,) * 2),
    "redux.sync.min.s32": Warpwide(lambda x, _: _reduce(x, np.min, np.int32), (_W,) * 2),
    "movmatrix.sync.aligned.m8n8.trans.b16": Warpwide(_transpose, (_W,)),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": Warpwide(product, (_W,) * 3),
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32": Warpwide(byte_product, (_W,) * 3),
}
