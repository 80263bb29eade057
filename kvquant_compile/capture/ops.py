"""Names of ATen ops by what they do; shared by everything that walks graphs."""

from __future__ import annotations

from torch import fx

# Ops whose output elements are input elements, moved, repeated or dropped.
_VIEWS = """view reshape _unsafe_view transpose permute slice select unsqueeze squeeze expand alias
    detach split split_with_sizes chunk unbind flatten unflatten narrow movedim swapaxes swapdims t
    view_as expand_as reshape_as diagonal tensor_split"""
_COPIES = "clone contiguous roll repeat repeat_interleave flip index_select lift_fresh_copy"
JOINS = frozenset(("cat", "stack", "hstack", "concat", "concatenate"))
VIEWS = frozenset(_VIEWS.split())
MOVES = VIEWS | frozenset(_COPIES.split()) | JOINS
CASTS = frozenset(("to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"))
# What carries one tensor along.
CARRIES = (MOVES | CASTS) - JOINS


def op_name(node: fx.Node) -> str:
    """``mul`` for ``aten.mul.Tensor``; the plain name of other callables."""
    parts = str(node.target).split(".")
    if parts[0] == "aten":
        return parts[1]
    return getattr(node.target, "__name__", str(node.target))


def origin(node: fx.Node) -> fx.Node:
    """What a tensor is a moved, repeated or cast version of."""
    while node.op == "call_function" and op_name(node) in CARRIES:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node
