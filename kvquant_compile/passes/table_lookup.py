"""Precomputed cos/sin tables: a lookup at the position, and which cosine its columns are.

Hand-written decoders often keep ``cos[max_positions, d/2]`` in a buffer and slice or index it. The
looked-up row is then a vector of unknown functions of the position, one per column; each column is
matched with ``a*cos(f*p)`` or ``a*sin(f*p)`` over the whole table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import sympy
import torch
from sympy import Expr
from torch import Tensor

from kvquant_compile.passes.symbols import NotInterpretable, Pool, Symbolic

Column = np.ndarray
_READS = ("slice", "select", "index", "embedding", "index_select", "narrow", "gather")
# float32 angles n*f of a table with thousands of rows are off by about n * f * 2**-24.
TABLE_TOLERANCE = 1e-3
# Relative error of the angles of a table, a few float32 roundings.
ANGLE_TOLERANCE = 1e-6


class Lookups:
    """The table columns met during an interpretation, each under a symbol of its own."""

    def __init__(self, position: Expr) -> None:
        self.position = position
        self.columns: dict[Expr, Column] = {}
        self._symbols: dict[bytes, Expr] = {}
        self._angles: set[Expr] = set()
        self._rounding = 0.0

    def is_lookup(self, name: str, args: Any) -> bool:
        """Whether an op reads a constant tensor (at something symbolic)."""
        return name in _READS and bool(args) and isinstance(args[0], Tensor)

    def read(self, pool: Pool, name: str, args: Any) -> Symbolic:
        """The looked-up tensor, in the one-token world.

        Raises:
            NotInterpretable: the table is not read at exactly the position.
        """
        table, rest = args[0], args[1:]
        if name == "embedding" or (name == "index" and len(rest[0]) == 1):
            where = rest[0] if name == "embedding" else rest[0][0]
            self._need_position({pool.scalars[i][0] for i in where.index.reshape(-1).tolist()})
            row = self._row(pool, table)
            return Symbolic(row.expand(*where.index.shape, *row.shape))
        if name == "gather":
            return self._gathered(pool, table, rest[0] % table.ndim, rest[1])
        if name in ("index", "index_select"):
            raise NotInterpretable(f"a table read by {name} along several axes")
        axis, start = rest[0] % table.ndim, rest[1]
        self._need_position({start})
        if name == "slice" and sympy.simplify(rest[2] - start) != 1:
            raise NotInterpretable("a table slice that is not the new tokens' rows")
        row = self._row(pool, table.movedim(axis, 0))
        return Symbolic(row if name == "select" else row.unsqueeze(axis))

    def _gathered(self, pool: Pool, table: Tensor, axis: int, where: Symbolic) -> Symbolic:
        """A gather whose index is the position everywhere, and as wide as the table."""
        self._need_position({pool.scalars[i][0] for i in where.index.reshape(-1).tolist()})
        row = self._row(pool, table.movedim(axis, 0)).unsqueeze(axis)
        if row.shape != where.index.shape:
            raise NotInterpretable("a table gathered in part")
        return Symbolic(row)

    def _need_position(self, rows: set[Expr]) -> None:
        if rows != {self.position}:
            raise NotInterpretable(f"a table lookup at {sorted(map(str, rows))}")

    def _row(self, pool: Pool, table: Tensor) -> Tensor:
        data = table.detach().cpu()
        if data.is_floating_point():
            self._rounding = max(self._rounding, torch.finfo(data.dtype).eps)
        if not data.is_complex():
            flat = data.double().reshape(len(data), -1).numpy()
            entries = [pool.intern(self._symbol(column)) for column in flat.T]
        else:
            flat = data.to(torch.complex128).reshape(len(data), -1).numpy()
            entries = [
                pool.intern(self._symbol(column.real), self._symbol(column.imag))
                for column in flat.T
            ]
        return torch.tensor(entries, dtype=torch.long).reshape(data.shape[1:])

    def _symbol(self, column: Column) -> Expr:
        key = column.tobytes()
        if key not in self._symbols:
            symbol = sympy.Symbol(f"table{len(self._symbols)}", real=True)
            self._symbols[key] = symbol
            self.columns[symbol] = column
        return self._symbols[key]

    def note_angles(self, outputs: Iterable[Expr]) -> None:
        """Remember which columns are angles: those whose cosine or sine the graph takes itself."""
        for output in outputs:
            for wave in output.atoms(sympy.cos, sympy.sin):
                self._angles |= wave.free_symbols & self.columns.keys()

    def fitted(self) -> tuple[dict[Expr, Expr], float]:
        """Every column as a function of the position, and the largest misfit.

        Raises:
            NotInterpretable: a column is no constant, no cosine or sine of a pair, and no angle.
        """
        fits: dict[Expr, Expr] = {}
        cosines: dict[Expr, Column] = {}
        sines: dict[Expr, Column] = {}
        worst, tolerance = 0.0, TABLE_TOLERANCE + self._rounding
        for symbol, column in self.columns.items():
            if np.ptp(column) == 0:
                fits[symbol] = sympy.Float(column[0], 17)
            elif symbol in self._angles:
                fits[symbol] = _rate(column) * self.position
            else:
                (sines if abs(column[0]) < 1e-9 else cosines)[symbol] = column
        for place, (symbol, column) in enumerate(cosines.items()):
            partner, fit = _partner(column, sines, place, tolerance)
            fits[symbol] = fit.amplitude * sympy.cos(fit.frequency * self.position)
            fits[partner] = fit.amplitude * sympy.sin(fit.frequency * self.position)
            worst = max(worst, fit.misfit)
        if len(fits) != len(self.columns) or worst > tolerance:
            raise NotInterpretable("a lookup table that is not the cosine and sine of an angle")
        return fits, worst


def _rate(column: Column) -> Expr:
    """The float32 frequency of a column of angles.

    Raises:
        NotInterpretable: it is no multiple of the position.
    """
    rate = np.float32(column[1])
    angles = np.arange(len(column), dtype=np.float32) * rate
    if not np.allclose(angles, column, rtol=ANGLE_TOLERANCE, atol=0):
        raise NotInterpretable("a lookup table of angles that are no multiples of the position")
    return sympy.Float(float(rate), 17)


def _partner(
    cosine: Column, sines: dict[Expr, Column], place: int, tolerance: float
) -> tuple[Expr, _Wave]:
    """The sine column of a cosine's angle: the one in the same place, if it fits, since slow
    columns of a rounded table look alike; else the one whose squares add up best to a constant."""
    if not sines:
        raise NotInterpretable("a cosine table without a sine table")
    symbols = list(sines)
    if place < len(symbols):
        fit = _Wave.fit(cosine, sines[symbols[place]])
        if fit.misfit <= tolerance:
            return symbols[place], fit
    amplitude = cosine[0] ** 2
    best = min(symbols, key=lambda s: float(np.abs(cosine**2 + sines[s] ** 2 - amplitude).max()))
    return best, _Wave.fit(cosine, sines[best])


class _Wave:
    """amplitude * (cos, sin)(frequency * n), with a frequency that is a float32 value."""

    def __init__(self, amplitude: float, frequency: float, misfit: float) -> None:
        self.amplitude, self.misfit = sympy.Float(amplitude, 17), misfit
        self.frequency = sympy.Float(frequency, 17)

    @staticmethod
    def fit(cosine: Column, sine: Column) -> _Wave:
        """Least squares on the unwrapped angle, then the best float32 neighbour."""
        n = np.arange(len(cosine), dtype=np.float64)
        angle = np.unwrap(np.arctan2(sine, cosine))
        near = np.float32((n * angle).sum() / (n * n).sum())
        candidates = [near]
        for direction in (-np.inf, np.inf):
            for _ in range(3):
                candidates.append(np.nextafter(candidates[-1], np.float32(direction)))
            candidates.append(near)
        errors = [_misfit(cosine, sine, f) for f in candidates]
        best = int(np.argmin(errors))
        return _Wave(float(cosine[0]), float(candidates[best]), errors[best])


def _misfit(cosine: Column, sine: Column, frequency: np.float32) -> float:
    angle = np.arange(len(cosine), dtype=np.float32) * frequency
    error = np.abs(cosine[0] * np.cos(angle) - cosine) + np.abs(cosine[0] * np.sin(angle) - sine)
    return float(error.max())
