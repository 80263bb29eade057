"""Tensors of symbols: every element is an index into one pool of sympy expressions.

Ops that only move elements run as themselves on the tensor of indices, whatever their spelling,
so that only arithmetic has to be defined, on scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from sympy import Expr
from torch import Tensor

Scalar = tuple[Expr, Expr]  # real and imaginary part


class NotInterpretable(Exception):
    """An op or a value that the symbolic interpretation does not cover; the text says which."""


@dataclass(frozen=True)
class Symbolic:
    """A tensor whose elements are pool entries; ``index`` is int64 of the tensor's shape."""

    index: Tensor


class Pool:
    """Interned complex expressions, with memoised arithmetic on them."""

    def __init__(self) -> None:
        self.scalars: list[Scalar] = []
        self._known: dict[Scalar, int] = {}
        self._memo: dict[tuple[str | int, ...], int] = {}

    def intern(self, real: Expr, imaginary: Expr = sympy.S.Zero) -> int:
        """The index of an expression, the same for the same expression."""
        key = (real, imaginary)
        if key not in self._known:
            self._known[key] = len(self.scalars)
            self.scalars.append(key)
        return self._known[key]

    def lift(self, value: Tensor | float | int | Expr | Symbolic) -> Symbolic:
        """A number, tensor of numbers or expression as a symbolic tensor; floats exactly."""
        if isinstance(value, Symbolic):
            return value
        if isinstance(value, Expr):
            return Symbolic(torch.tensor(self.intern(value)))
        tensor = torch.as_tensor(value).detach().cpu()
        if tensor.is_complex():
            parts = torch.view_as_real(tensor.to(torch.complex128))
            flat = parts.reshape(-1, 2)
        else:
            flat = torch.stack([tensor.double(), torch.zeros_like(tensor.double())], -1)
            flat = flat.reshape(-1, 2)
        rows = [self.intern(_number(re), _number(im)) for re, im in flat.tolist()]
        return Symbolic(torch.tensor(rows, dtype=torch.long).reshape(tensor.shape))

    def map(self, name: str, rule: Callable[[Scalar], Scalar], x: Symbolic) -> Symbolic:
        """Apply a scalar rule to every element."""
        entries, where = torch.unique(x.index, return_inverse=True)
        results = torch.tensor(
            [self._cached(name, rule, e) for e in entries.tolist()], dtype=torch.long
        )
        return Symbolic(results[where].reshape(x.index.shape))

    def combine(
        self, name: str, rule: Callable[[Scalar, Scalar], Scalar], x: Symbolic, y: Symbolic
    ) -> Symbolic:
        """Apply a scalar rule to every pair of elements, broadcasting."""
        a, b = torch.broadcast_tensors(x.index, y.index)
        pairs, where = torch.unique(
            torch.stack([a.reshape(-1), b.reshape(-1)]), dim=1, return_inverse=True
        )
        results = torch.tensor(
            [self._cached(name, rule, *p) for p in pairs.t().tolist()], dtype=torch.long
        )
        return Symbolic(results[where].reshape(a.shape))

    def _cached(self, name: str, rule: Callable[..., Scalar], *entries: int) -> int:
        key: tuple[str | int, ...] = (name, *entries)
        if key not in self._memo:
            self._memo[key] = self.intern(*rule(*(self.scalars[e] for e in entries)))
        return self._memo[key]


def _number(value: float) -> Expr:
    # Integers stay exact symbols of 0 and 1, so that 0*x vanishes and 1*x is x.
    return sympy.Integer(int(value)) if value == int(value) else sympy.Float(value, 17)


def add(x: Scalar, y: Scalar) -> Scalar:
    """x + y."""
    return x[0] + y[0], x[1] + y[1]


def subtract(x: Scalar, y: Scalar) -> Scalar:
    """x - y."""
    return x[0] - y[0], x[1] - y[1]


def multiply(x: Scalar, y: Scalar) -> Scalar:
    """x * y, complex."""
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def divide(x: Scalar, y: Scalar) -> Scalar:
    """x / y for a real number y.

    Raises:
        NotInterpretable: y is not a real number.
    """
    if y[1] != 0 or not y[0].is_number or y[0] == 0:
        raise NotInterpretable("division by something that is not a number")
    return x[0] / y[0], x[1] / y[0]


def negate(x: Scalar) -> Scalar:
    """-x."""
    return -x[0], -x[1]


def real_function(function: Callable[[Expr], Expr]) -> Callable[[Scalar], Scalar]:
    """A rule applying a real function.

    Raises (when the rule is applied):
        NotInterpretable: the argument is complex.
    """

    def rule(x: Scalar) -> Scalar:
        if x[1] != 0:
            raise NotInterpretable("a real function of a complex number")
        return function(x[0]), sympy.S.Zero

    return rule
