"""One-edit changes of a function's source, as mutation testing makes them, for rotary code."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

_PAIRS = (
    ("cos", "sin"), ("q", "k"), ("query", "key"), ("query_states", "key_states"),
    ("q_embed", "k_embed"), ("q_rot", "k_rot"), ("k_rot", "k_pass"), ("x1", "x2"), ("a", "b"),
    ("first_half", "second_half"), ("first_", "second_"), ("even", "odd"),
)  # fmt: skip
_OTHER = {name: other for a, b in _PAIRS for name, other in ((a, b), (b, a))}
_POSITIONS = ("position_ids", "past", "positions")
_FREQUENCIES = ("inv_freq", "frequencies")
_OPERATORS: dict[type, tuple[type, str]] = {
    ast.Add: (ast.Sub, "sign flipped"), ast.Sub: (ast.Add, "sign flipped"),
    ast.Mult: (ast.Add, "product made a sum"), ast.Div: (ast.Mult, "division made a product"),
}  # fmt: skip

# What is done to the tensors that are assigned or returned.
_WRAPPED = {
    "normalised": "torch.nn.functional.normalize({}, dim=-1)",
    "weighted by channel": "({0}) * torch.linspace(0.5, 1.5, ({0}).shape[-1])",
    "channels rolled": "({}).roll(1, -1)",
    "second axis rolled": "({}).roll(1, 1)",
    "third axis rolled": "({}).roll(1, 2)",
    "rows of the batch exchanged": "({}).flip(0)",
    "squashed": "({}).tanh()",
    "scaled": "({}) * 1.25",
    "rounded": "({}).bfloat16().float()",
    "shifted": "({}) + 0.125",
}
_PLACES = {
    "position plus 1": "({} + 1)", "position doubled": "({} * 2)",
    "position halved": "({} // 2)", "position backwards": "(-{})",
}  # fmt: skip
_RATES = {
    "frequencies doubled": "({} * 2)", "frequencies squared": "({} * {})",
    "frequencies reversed": "({}.flip(0))", "frequencies plus 0.1": "({} + 0.1)",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit.

    Attributes:
        kind: what was done.
        where: the line, before and after.
        tree: the edited function.
    """

    kind: str
    where: str
    tree: ast.FunctionDef


def source_tree(function: Callable[..., Any]) -> ast.FunctionDef:
    """A function's definition without decorators and docstring."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return tree


def edits(function: Callable[..., Any], about: tuple[str, ...] = ()) -> Iterator[Edit]:
    """Every edit of a function, outer nodes first; no two give the same source.

    Args:
        function: has source code.
        about: only statements that use or define one of these names are edited; all if empty.
    """
    tree = source_tree(function)
    seen = {ast.unparse(tree)}
    chosen = {id(n) for s in tree.body if not about or _mentions(s, about) for n in ast.walk(s)}
    for place, node in enumerate(ast.walk(tree)):
        for kind, new in _rules(node) if id(node) in chosen else ():
            edited = copy.deepcopy(tree)
            target = list(ast.walk(edited))[place]
            _Replace(target, new).visit(edited)
            ast.fix_missing_locations(edited)
            text = ast.unparse(edited)
            if text not in seen:
                seen.add(text)
                yield Edit(kind, f"{ast.unparse(node)} -> {ast.unparse(new)}", edited)


def compiled(function: Callable[..., Any], edit: Edit) -> Callable[..., Any]:
    """The edited function, with the globals of the original."""
    original = inspect.unwrap(function)
    assert isinstance(original, FunctionType)
    namespace: dict[str, Any] = {}
    module = ast.Module([edit.tree], [])
    exec(compile(module, "<mutant>", "exec"), original.__globals__, namespace)
    result: Callable[..., Any] = namespace[original.__name__]
    return result


def _mentions(statement: ast.stmt, names: tuple[str, ...]) -> bool:
    own = {getattr(n, field, None) for n in ast.walk(statement) for field in ("id", "name", "attr")}
    return bool(own & set(names))


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, new: ast.AST) -> None:
        self.target, self.new = target, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.target else self.generic_visit(node)


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _rules(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(kind, what stands in a node's place)."""
    if isinstance(node, ast.BinOp):
        yield from _binary(node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "minus dropped", node.operand
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield from _named(node, node.id)
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield from _attribute(node)
    elif isinstance(node, ast.Slice):
        yield from _slice(node)
    elif isinstance(node, ast.Call):
        yield from _call(node)
    elif isinstance(node, (ast.Tuple, ast.List)) and isinstance(node.ctx, ast.Load):
        yield "order reversed", type(node)(elts=node.elts[::-1], ctx=node.ctx)
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        for kind, value in _wrapped(node.value):
            yield kind, ast.Assign(node.targets, value, lineno=1)
    elif isinstance(node, ast.Return) and node.value is not None:
        yield from _returned(node.value)


def _binary(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    if type(node.op) in _OPERATORS:
        other, kind = _OPERATORS[type(node.op)]
        yield kind, ast.BinOp(node.left, other(), node.right)
        yield "one operand only", node.left
        yield "one operand only", node.right


def _named(node: ast.expr, name: str) -> Iterator[tuple[str, ast.AST]]:
    if name in _OTHER:
        yield "another tensor", _expression(_OTHER[name])
    for names, templates in ((_POSITIONS, _PLACES), (_FREQUENCIES, _RATES)):
        if name in names:
            text = ast.unparse(node)
            for kind, template in templates.items():
                yield kind, _expression(template.replace("{}", text))


def _attribute(node: ast.Attribute) -> Iterator[tuple[str, ast.AST]]:
    if node.attr in ("cos", "sin"):
        yield "cos for sin", ast.Attribute(node.value, _OTHER[node.attr], node.ctx)
    elif node.attr in _FREQUENCIES:
        yield from _named(node, node.attr)


def _slice(node: ast.Slice) -> Iterator[tuple[str, ast.AST]]:
    if (node.lower is None) != (node.upper is None) and node.step is None:
        yield "the other half", ast.Slice(node.upper, node.lower)
    for bound in ("lower", "upper"):
        value = getattr(node, bound)
        if value is not None:
            moved = ast.Slice(node.lower, node.upper, node.step)
            setattr(moved, bound, ast.BinOp(value, ast.Add(), ast.Constant(1)))
            yield "slice shifted", moved
    if node.step is not None:
        start = node.lower.value if isinstance(node.lower, ast.Constant) else 0
        yield "the other half", ast.Slice(ast.Constant(1 - start), node.upper, node.step)


def _call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.func, ast.Name) and node.args:
        yield "call dropped", node.args[0]
        if len(node.args) > 1:
            swapped = [node.args[1], node.args[0], *node.args[2:]]
            yield "arguments exchanged", ast.Call(node.func, swapped, node.keywords)
    for i, argument in enumerate(node.args):
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int):
            changed = [*node.args[:i], ast.Constant(argument.value + 1), *node.args[i + 1 :]]
            yield "constant plus 1", ast.Call(node.func, changed, node.keywords)


def _wrapped(value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    text = ast.unparse(value)
    for kind, template in _WRAPPED.items():
        yield kind, _expression(template.format(text))


def _returned(value: ast.expr) -> Iterator[tuple[str, ast.AST]]:
    parts = value.elts if isinstance(value, ast.Tuple) else [value]
    for i, part in enumerate(parts):
        for kind, new in _wrapped(part):
            changed = [*parts[:i], new, *parts[i + 1 :]]
            whole = ast.Tuple(changed, ast.Load()) if isinstance(value, ast.Tuple) else new
            yield kind, ast.Return(whole)
