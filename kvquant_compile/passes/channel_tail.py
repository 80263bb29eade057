"""What follows a rotation and can trade places with it: a norm of the head vector, and weights.

A norm multiplies a head vector by a function of the sum of its squares, which no rotation changes:
N(R x) = R N(x). Weights, one per channel, do not pass through a rotation, but a factor of a key
may as well be one of its query: q . (w * k) = (w * q) . k. Both are read off the graph, op by op:
squares become a length only by a sum or mean over the whole last axis, lengths stay lengths
under functions of numbers, and a head vector may be multiplied by lengths and constants only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from kvquant_compile.capture.ops import CARRIES, CASTS, op_name
from kvquant_compile.passes.taint import (
    Taint,
    carries_tensor,
    float_value,
    is_barrier,
    per_channel,
    rotation_site,
)

# What a node is: the rotated vector times lengths; its squares; a function of its length; the
# vector in other places; the vector times weights.
_VECTOR, _SQUARES, _LENGTH, _MOVED, _WEIGHTED = "vector", "squares", "length", "moved", "weighted"
_SAME = CASTS | {"contiguous", "clone", "alias", "detach"}
_OF_NUMBERS = frozenset(("add", "sub", "mul", "div", "pow", "sqrt", "rsqrt", "reciprocal", "clamp",
                         "clamp_min", "maximum", "expand", "expand_as"))  # fmt: skip
_SQUARING = ("pow", "square", "mul", "linalg_vector_norm", "rms_norm")
# Nodes among which its squares are looked for.
_NEAR = 64


class NoTail(Exception):
    """What follows the rotation is more than a norm and weights; the text says what."""


@dataclass(frozen=True, eq=False)
class Tail:
    """A norm (none where ``result`` is ``source``), then moves, casts and weights.

    Attributes:
        source: the rotated vector that is normed.
        result: the normed vector, in the same layout.
        end: the result in its last layout and dtype, times the weights.
        weighted: the nodes that multiply by weights; ``result`` is one if its op does it itself.
        weights: the weights as nodes of the graph, [..., 1, channels] without any other axis.
    """

    source: fx.Node
    result: fx.Node
    end: fx.Node
    weighted: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]


def tail_of(end: fx.Node, known: Taint) -> Tail | None:
    """The norm and weights which end in a tensor [B, H, S, D]; None where there is neither.

    Raises:
        NoTail: squares are summed there, but it is no norm that rotations pass through.
    """
    source = _squared(end)
    if source is None or not rotation_site(source, known).mixed:  # normed before its rotation
        source = _below_weights(end, known)
    if source is None:
        return None
    kinds: dict[fx.Node, str] = {source: _VECTOR}
    weights: dict[fx.Node, fx.Node] = {}
    inside = between(source, end)
    for node in sorted(inside, key=known.order.__getitem__):
        kinds[node], weight = _kind(node, kinds, known)
        if weight is not None:
            weights[node] = weight
    if kinds[end] in (_LENGTH, _SQUARES):
        raise NoTail(f"{end.name} is a function of its length only")
    result = max((n for n, kind in kinds.items() if kind == _VECTOR), key=known.order.__getitem__)
    if result is source and not weights:
        return None
    return Tail(source, result, end, tuple(weights), tuple(weights.values()))


def between(source: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on a way from one node to another, the latter included."""
    after, pending = {source}, [source]
    while pending:
        new = [user for user in pending.pop().users if user not in after]
        after.update(new)
        pending += new
    found, pending = set(), [end]
    while pending:
        node = pending.pop()
        if node in after and node is not source and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _squared(end: fx.Node) -> fx.Node | None:
    """The vector, before casts, of which a result has the squares, close before it."""
    pending, seen = [end], {end}
    while pending and len(seen) < _NEAR:
        node = pending.pop(0)
        if node.op != "call_function" or is_barrier(node):
            continue
        if op_name(node) in _SQUARING and _squares(node):
            source = node.all_input_nodes[0]
            while op_name(source) in CASTS and len(source.all_input_nodes) == 1:
                source = source.all_input_nodes[0]
            return source
        pending += [i for i in node.all_input_nodes if i not in seen]
        seen.update(node.all_input_nodes)
    return None


def _squares(node: fx.Node) -> bool:
    """Whether an op is a square, or computes one; ``mul`` is one of equal factors."""
    if op_name(node) == "pow":
        return bool(node.args[1] == 2)
    return op_name(node) != "mul" or node.args[0] is node.args[1]


def _below_weights(end: fx.Node, known: Taint) -> fx.Node | None:
    """What a tensor is before its weights; None where it has none."""
    node, found = end, None
    while node.op == "call_function":
        data = [i for i in node.all_input_nodes if i in known.data]
        weighted = op_name(node) == "mul" and _weight(node, known) is not None
        if len(data) != 1 or not (weighted or _keeps_channels(node)):
            break
        node = data[0]
        found = node if weighted else found
    return found


def _weight(node: fx.Node, known: Taint) -> fx.Node | None:
    """The other factor of a product, where it is one constant per channel of the last axis."""
    return next((i for i in node.all_input_nodes if per_channel(i, known, node)), None)


def _keeps_channels(node: fx.Node) -> bool:
    """Whether an op moves no element along the last axis."""
    if op_name(node) not in ("transpose", "permute"):
        return op_name(node) in _SAME
    axes = node.args[1:] if op_name(node) == "transpose" else node.args[1]
    count = float_value(node).ndim
    places = [int(axis) % count for axis in axes]  # type: ignore[union-attr,arg-type]
    return count - 1 not in places or (len(places) == count and places[-1] == count - 1)


def _kind(node: fx.Node, kinds: Mapping[fx.Node, str], known: Taint) -> tuple[str, fx.Node | None]:
    """What a node is, and the weights that it multiplies by.

    Raises:
        NoTail: nothing that rotations or weights are known to pass through.
    """
    name = op_name(node)
    tensors = [i for i in node.all_input_nodes if carries_tensor(i)]
    given = [kinds[i] for i in tensors if i in kinds]
    main, weight = kinds.get(tensors[0], ""), _weight(node, known)
    if main and (name in _SAME or (name == "expand_as" and main == _LENGTH)):
        return main, None
    constant = len(tensors) == 1 or weight is not None
    if name == "rms_norm" and main == _VECTOR and _whole_axis(node) and constant:
        return _VECTOR, weight
    if (found := _length_kind(node, name, given)) and all(i in kinds for i in tensors):
        return found, None
    if name == "mul" and given in ([_VECTOR], [_MOVED], [_WEIGHTED]) and weight is not None:
        return _WEIGHTED, weight
    if given == [_WEIGHTED] and len(tensors) == 1 and _keeps_channels(node):
        return _WEIGHTED, None
    if given in ([_VECTOR], [_MOVED]) and len(tensors) == 1 and name in CARRIES:
        return _MOVED, None
    what = " and ".join(f"its {kind}" if kind != _WEIGHTED else "it, weighted" for kind in given)
    raise NoTail(f"{node.target} of {what}")


def _length_kind(node: fx.Node, name: str, given: list[str]) -> str:
    """What becomes of squares and lengths; empty for ops that are not known."""
    if given == [_VECTOR]:
        if name == "linalg_vector_norm" and _of_last_axis(node, 2) and node.args[1] == 2:
            return _LENGTH
        if name in ("pow", "square", "mul") and _squares(node):
            return _SQUARES
        if name in ("mul", "div") and node.args[0] in node.all_input_nodes:
            return _VECTOR if isinstance(node.args[1], (int, float)) else ""
    if given == [_SQUARES] and name in ("mean", "sum") and _of_last_axis(node, 1):
        return _LENGTH
    if set(given) == {_LENGTH} and name in _OF_NUMBERS:
        return _LENGTH
    products = {"mul": ([_VECTOR, _LENGTH], [_LENGTH, _VECTOR]), "div": ([_VECTOR, _LENGTH],)}
    if given in products.get(name, ()):
        return _VECTOR
    return ""


def _of_last_axis(node: fx.Node, place: int) -> bool:
    """Whether a reduction is over the last axis alone, which is kept with size 1."""
    arguments: tuple[Any, ...] = (*node.args[place:], None, None)
    source = float_value(node.all_input_nodes[0])
    axes = arguments[0] if isinstance(arguments[0], (list, tuple)) else [arguments[0]]
    last = [axis for axis in axes if axis in (-1, source.ndim - 1)]
    return len(last) == len(axes) == 1 and bool(arguments[1] or node.kwargs.get("keepdim"))


def _whole_axis(node: fx.Node) -> bool:
    shape: Any = node.args[1]
    value = node.meta["val"]
    return isinstance(value, Tensor) and list(shape) == [value.shape[-1]]
