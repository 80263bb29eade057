"""Symbolic interpretation of a rotation: from positions and one head vector to the rotated one.

One token is interpreted, at the symbolic position ``p``, for one head vector ``x0, x1, ...`` that
all heads share. Whatever moves elements is run by torch itself on indices; arithmetic is done by
sympy; tables that are looked up at ``p`` become columns for :mod:`.table_fit`. Anything else stops
the proof with its name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from kvquant_compile.capture.ops import CASTS, JOINS, MOVES, op_name
from kvquant_compile.capture.run import attribute
from kvquant_compile.passes.symbols import (
    NotInterpretable,
    Pool,
    Symbolic,
    add,
    divide,
    multiply,
    negate,
    real_function,
    subtract,
)
from kvquant_compile.passes.table_lookup import Lookups

POSITION = sympy.Symbol("p", real=True)
_PAST = sympy.Symbol("past", real=True)

_BINARY: dict[str, Callable[..., Any]] = {
    "add": add, "sub": subtract, "mul": multiply, "div": divide,
}  # fmt: skip
_HARMLESS = frozenset(("dtype", "device", "layout", "pin_memory", "memory_format"))
_REAL = {"cos": sympy.cos, "sin": sympy.sin}


class Interpreter:
    """Symbolic values of the nodes of one graph; what depends on no data is kept across sites.

    Args:
        gm: the captured graph.
        by_columns: positions come from ``past`` alone (one token stands at ``past``).
    """

    def __init__(self, gm: fx.GraphModule, *, by_columns: bool) -> None:
        self.gm, self.pool, self.lookups = gm, Pool(), Lookups(POSITION)
        self.angles: dict[fx.Node, Symbolic] = {}
        self.shared: dict[fx.Node, Any] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            if node.target == "past":
                self.shared[node] = POSITION if by_columns else _PAST
            elif node.target == "position_ids":
                self.shared[node] = Symbolic(self.pool.lift(POSITION).index.reshape(1, 1))

    def run(self, source: fx.Node, value: Symbolic, end: fx.Node) -> Symbolic:
        """The value of ``end`` when ``source`` has the given value.

        Raises:
            NotInterpretable: some node on the way is outside the interpreted language.
        """
        local: dict[fx.Node, Any] = {source: value}
        touched = _downstream(source)
        pending = [end]
        while pending:
            node = pending[-1]
            env = local if node in touched else self.shared
            needed = [] if node in env or op_name(node) == "sym_size" else node.all_input_nodes
            missing = [i for i in needed if i not in local and i not in self.shared]
            if missing:
                pending += missing
                continue
            if node not in env:
                env[node] = self._value(node, local)
            pending.pop()
        result = local[end] if end in local else self.shared[end]
        return self.pool.lift(result)

    def _value(self, node: fx.Node, local: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return attribute(self.gm, str(node.target))
        if op_name(node) == "sym_size":
            return self._size(node)
        if node.op != "call_function":
            raise NotInterpretable(f"it reads {node.name}, which is no position")
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: local[n] if n in local else self.shared[n]
        )
        symbolic = _contains(args, Symbolic) or _contains(args, sympy.Expr)
        if not symbolic and not _contains(kwargs, Symbolic):
            assert callable(node.target)
            return node.target(*args, **kwargs)
        return self._symbolic(node, args, kwargs)

    def _size(self, node: fx.Node) -> int:
        """Sizes in the one-token world: one batch row, one new token."""
        value = node.meta.get("val")
        return value if isinstance(value, int) else 1

    def _symbolic(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name = op_name(node)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if isinstance(node.target, type(operator.add)) and not _contains(args, Symbolic):
            return node.target(*args)
        if self.lookups.is_lookup(name, args):
            return self.lookups.read(self.pool, name, args)
        if name in MOVES:
            return self._move(node, args, kwargs)
        if name in CASTS:
            return _cast(node, args)
        return self._arithmetic(node, name, args, kwargs)

    def _move(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        def index(value: Any) -> Any:
            if isinstance(value, Symbolic):
                return value.index
            if isinstance(value, (list, tuple)):
                return type(value)(index(v) for v in value)
            # Joined with symbols, numbers become symbols too; indices stay what they are.
            joins = isinstance(value, Tensor) and op_name(node) in JOINS
            return self.pool.lift(value).index if joins else value

        assert callable(node.target)
        moved = node.target(*index(args), **kwargs)
        if isinstance(moved, Tensor):
            return Symbolic(moved)
        return [Symbolic(part) for part in moved]

    def _arithmetic(self, node: fx.Node, name: str, args: Any, kwargs: Any) -> Any:
        pool = self.pool
        if kwargs and set(kwargs) - _HARMLESS:
            raise NotInterpretable(f"{node.target} with {sorted(kwargs)}")
        if name in _BINARY:
            return pool.combine(name, _BINARY[name], pool.lift(args[0]), pool.lift(args[1]))
        if name == "neg":
            return pool.map(name, negate, args[0])
        if name in _REAL:
            self.angles[node.all_input_nodes[0]] = args[0]
            return pool.map(name, real_function(_REAL[name]), args[0])
        if name in _MORE:
            return _MORE[name](self, node, *args)
        raise NotInterpretable(f"{node.target} is neither a move, sum, product, cos nor sin")


def _cast(node: fx.Node, args: Any) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return args[0]
    source = float_or_none(node)
    if source is not None and not source.is_floating_point():
        return args[0]
    raise NotInterpretable(f"{node.target} rounds to {getattr(value, 'dtype', None)}")


def float_or_none(node: fx.Node) -> Tensor | None:
    """The fake tensor of a node's first input, if it is a tensor."""
    value = node.all_input_nodes[0].meta.get("val")
    return value if isinstance(value, Tensor) else None


def _outer(it: Interpreter, node: fx.Node, a: Any, b: Any) -> Symbolic:
    x, y = it.pool.lift(a), it.pool.lift(b)
    return it.pool.combine("mul", multiply, Symbolic(x.index[:, None]), y)


def _matmul(it: Interpreter, node: fx.Node, a: Any, b: Any) -> Symbolic:
    x, y = it.pool.lift(a), it.pool.lift(b)
    if x.index.ndim < 2 or y.index.ndim < 2 or x.index.shape[-1] != 1:
        raise NotInterpretable(f"{node.target} that sums over more than one element")
    return it.pool.combine("mul", multiply, x, y)


def _einsum(it: Interpreter, node: fx.Node, equation: str, operands: Any, *_: Any) -> Symbolic:
    if equation.replace(" ", "") not in ("i,j->ij", "a,b->ab", "n,d->nd", "t,d->td", "s,d->sd"):
        raise NotInterpretable(f"einsum {equation}")
    return _outer(it, node, *operands)


def _arange(it: Interpreter, node: fx.Node, start: Any, end: Any = None, step: Any = 1) -> Symbolic:
    if end is None:
        start, end = 0, start
    length = sympy.simplify(end - start)
    if step != 1 or not length.is_Integer:
        raise NotInterpretable("arange whose length depends on the position")
    return it.pool.combine("add", add, it.pool.lift(start), it.pool.lift(torch.arange(int(length))))


def _polar(it: Interpreter, node: fx.Node, size: Any, angle: Any) -> Symbolic:
    it.angles[node.all_input_nodes[-1]] = angle

    def turn(r: Any, t: Any) -> Any:
        return r[0] * sympy.cos(t[0]), r[0] * sympy.sin(t[0])

    return it.pool.combine("polar", turn, it.pool.lift(size), angle)


def _as_complex(it: Interpreter, node: fx.Node, x: Symbolic) -> Symbolic:
    def join(re: Any, im: Any) -> Any:
        return re[0], im[0]

    return it.pool.combine(
        "complex", join, Symbolic(x.index[..., 0]), Symbolic(x.index[..., 1])
    )  # fmt: skip


def _as_real(it: Interpreter, node: fx.Node, x: Symbolic) -> Symbolic:
    parts = [_real(it, node, x), _imag(it, node, x)]
    return Symbolic(torch.stack([part.index for part in parts], -1))


def _real(it: Interpreter, node: fx.Node, x: Symbolic) -> Symbolic:
    return it.pool.map("real", lambda s: (s[0], sympy.S.Zero), x)


def _imag(it: Interpreter, node: fx.Node, x: Symbolic) -> Symbolic:
    return it.pool.map("imag", lambda s: (s[1], sympy.S.Zero), x)


def _ones(it: Interpreter, node: fx.Node, x: Symbolic, *_: Any) -> Tensor:
    return torch.ones(x.index.shape)


def _rsub(it: Interpreter, node: fx.Node, a: Any, b: Any) -> Symbolic:
    return it.pool.combine("sub", subtract, it.pool.lift(b), it.pool.lift(a))


def _addcmul(it: Interpreter, node: fx.Node, a: Any, b: Any, c: Any) -> Symbolic:
    product = it.pool.combine("mul", multiply, it.pool.lift(b), it.pool.lift(c))
    return it.pool.combine("add", add, it.pool.lift(a), product)


_MORE: dict[str, Callable[..., Any]] = {
    "outer": _outer, "ger": _outer, "matmul": _matmul, "bmm": _matmul, "mm": _matmul,
    "einsum": _einsum, "arange": _arange, "polar": _polar, "view_as_complex": _as_complex,
    "view_as_real": _as_real, "real": _real, "imag": _imag, "ones_like": _ones,
    "rsub": _rsub, "addcmul": _addcmul,
}  # fmt: skip


def _contains(value: Any, kind: type) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_contains(v, kind) for v in value)
    if isinstance(value, dict):
        return any(_contains(v, kind) for v in value.values())
    return isinstance(value, kind)


def _downstream(source: fx.Node) -> set[fx.Node]:
    found, pending = {source}, [source]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found
