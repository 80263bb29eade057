"""Blocks as text and back: the format string of a graph, the header of an artifact.

The text is the expression that makes the block, ``Hadamard() >> Affine(bits=2, group=64)``, without
the options that have their default. Blocks of this package go by their class's name, others by
``module.Class``; a module is never imported for it, so that reading a file cannot run code: it
must have been imported before.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from kvquant_compile.codec.algebra.base import Block
from kvquant_compile.codec.algebra.compose import Chain, Pipeline, Sum
from kvquant_compile.errors import OptionError


def to_text(value: Any, known: Mapping[str, type]) -> str:
    """The expression that makes a dataclass, a tuple of such, or a literal.

    Args:
        value: frozen dataclasses whose fields are such values.
        known: classes that go by their short name.
    """
    if isinstance(value, tuple):
        inner = ", ".join(to_text(v, known) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    if isinstance(value, Sum | Chain | Pipeline):
        return _composed(value, known)
    kind = type(value)
    short = known.get(kind.__name__) is kind
    name = kind.__name__ if short else f"{kind.__module__}.{kind.__qualname__}"
    fields = [(f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
    given = [f"{f.name}={to_text(v, known)}" for f, v in fields if v != _default(f)]
    return f"{name}({', '.join(given)})"


def _composed(block: Sum | Chain | Pipeline, known: Mapping[str, type]) -> str:
    """Operands joined by their operator, which binds weaker in pipelines than in sums."""
    if isinstance(block, Sum):
        texts = [(term, to_text(term, known)) for term in block.terms]
        return " + ".join(f"({t})" if isinstance(b, Pipeline) else t for b, t in texts)
    last = (block.codec,) if isinstance(block, Pipeline) else ()
    return " >> ".join(
        f"({to_text(b, known)})" if isinstance(b, Sum) else to_text(b, known)
        for b in (*block.stages, *last)
    )


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def from_text(text: str, known: Mapping[str, type]) -> Any:
    """Inverse of :func:`to_text`.

    Raises:
        ValueError: the text is no such expression.
        OptionError: it names a class that is not there.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not a recipe: {text!r}") from error
    return _value(tree, known)


def _value(node: ast.expr, known: Mapping[str, type]) -> Any:
    if isinstance(node, ast.Tuple):
        return tuple(_value(item, known) for item in node.elts)
    if isinstance(node, ast.Call) and not node.args:
        kind = _class(ast.unparse(node.func), known)
        return kind(**{str(k.arg): _value(k.value, known) for k in node.keywords})
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _value(node.left, known) >> _value(node.right, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _value(node.left, known) + _value(node.right, known)
    return ast.literal_eval(node)


def _class(name: str, known: Mapping[str, type]) -> type:
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    kind = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Block) and dataclasses.is_dataclass(kind)):
        raise OptionError(
            f"no block named {name}",
            why="a recipe's blocks are frozen dataclasses at the top level of an imported module",
            do=f"Import {module or 'its module'} first, and define the block at its top level.",
        )
    return kind
