"""Biases that a query computes for every distance: from a dense tensor back to the distances.

Inkling adds to the score of query i and key j a number that query i computes for the distance
i - j, for as many distances as it has numbers, and nothing beyond. It passes all of it as one
tensor [B, Hq, S, T]. Rewritten attention reads keys block by block and never makes such a tensor:
what is needed are the numbers [B, Hq, S, extent] before they are spread, and a proof that they are
spread like that. Copies of random numbers are compared to the bit, for lengths on either side of
the extent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.ops import CASTS, op_name
from kvquant_compile.capture.run import Evaluator, widened
from kvquant_compile.capture.source_lines import source_line
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.errors import UnsupportedLayerError
from kvquant_compile.passes.taint import Taint, float_value, is_per_token

_BIAS_AT = 12


@dataclass(frozen=True, eq=False)
class DistanceBias:
    """What an attention's queries add to scores by distance.

    Attributes:
        logits: [B, Hq, S, extent]: entry d joins the score of the key d tokens before the query.
        evidence: JSON-able: extent, (tokens, past) that were tried, source line.
    """

    logits: fx.Node
    evidence: dict[str, Any]


class _NoDistances(Exception):
    """A bias is something else; the text says what."""


def distance_bias(captured: Captured, known: Taint, attend: fx.Node) -> DistanceBias | None:
    """The bias of an attend marker by distance; None where it has none. Adds nodes for it.

    Raises:
        UnsupportedLayerError: it is not proved to be a function of query and distance.
    """
    bias = attend.args[_BIAS_AT] if len(attend.args) > _BIAS_AT else None
    if not isinstance(bias, fx.Node):
        return None
    try:
        spread, after = _before_factors(bias, known)
        source = _before_spread(spread, known, float_value(bias))
        sizes = _check(captured, source, spread)
    except _NoDistances as reason:
        raise UnsupportedLayerError(
            "an attention layer cannot be matched",
            where=f"layer {attend.args[5]}, {source_line(bias) or 'of unknown source'}",
            why=f"it adds a tensor of its own to the scores, and {reason}",
            do="Report the model; only biases by query and distance are supported.",
        ) from reason
    evidence = {"extent": int(float_value(source).shape[3]), "sizes": [list(s) for s in sizes],
                "factors": len(after), "source": str(source_line(source) or "")}  # fmt: skip
    return DistanceBias(_again(source, spread, after), evidence)


def _before_factors(bias: fx.Node, known: Taint) -> tuple[fx.Node, list[fx.Node]]:
    """A bias before casts and products with a table of one number per query, and these."""
    node = bias
    after: list[fx.Node] = []
    while node.op == "call_function":
        data = [i for i in node.all_input_nodes if i in known.data]
        others = [i for i in node.all_input_nodes if i not in data]
        factor = op_name(node) == "mul" and all(is_per_token(i, known) for i in others)
        if len(data) != 1 or not (factor or (op_name(node) in CASTS and not others)):
            break
        after.insert(0, node)
        node = data[0]
    return node, after


def _before_spread(spread: fx.Node, known: Taint, bias: Tensor) -> fx.Node:
    """The last tensor [B, Hq, S, fixed number] from which alone the bias comes."""
    node = spread
    while True:
        shape = float_value(node).shape
        if node is not spread and len(shape) == 4 and isinstance(shape[3], int):
            break
        data = [i for i in node.all_input_nodes if i in known.data]
        if node.op != "call_function" or len(data) != 1:
            raise _NoDistances(f"{node.name} has no single source")
        node = data[0]
    if shape[1] != bias.shape[1] or str(shape[2]) != str(bias.shape[2]):
        raise _NoDistances(f"{node.name}, from which it comes, is not [B, heads, queries, numbers]")
    return node


def _check(captured: Captured, source: fx.Node, spread: fx.Node) -> list[tuple[int, int]]:
    """The (tokens, past) at which every visible number is the one of its distance.

    Raises:
        _NoDistances: at one of them it is not.
    """
    heads, extent = (int(float_value(source).shape[axis]) for axis in (1, 3))
    dtype, device = widened(float_value(source).dtype), captured.device
    sizes = [(1, 0), (6, 0), (1, 6), (3, 7), (1, extent), (2, extent + 5), (3, 2 * extent)]
    for tokens, past in sizes:
        generator = torch.Generator().manual_seed(tokens + past)
        x = torch.randn(1, heads, tokens, extent, generator=generator).to(device, dtype)
        values = input_values(captured.graph_module, past, tokens, 1)
        with torch.no_grad():
            run = Evaluator(captured.graph_module, {**values, source: x}, widen=captured.dtype)
            try:
                got = run(spread)
            except (KeyError, RuntimeError) as error:
                raise _NoDistances(f"{spread.name} cannot be evaluated alone: {error}") from error
        distance = torch.arange(past, past + tokens, device=device)[:, None]
        distance = distance - torch.arange(past + tokens, device=device)
        near = distance.clamp(0, extent - 1).expand(1, heads, -1, -1)
        expected = torch.where(distance < extent, x.gather(3, near), 0.0)
        seen = distance >= 0
        if got.shape != expected.shape or not torch.equal(got * seen, expected * seen):
            raise _NoDistances(f"it is no function of query and distance at {tokens} tokens after"
                               f" {past}")  # fmt: skip
    return sizes


def _again(source: fx.Node, spread: fx.Node, after: list[fx.Node]) -> fx.Node:
    """The casts and products of a bias, of the numbers before they are spread."""
    copies = {spread: source}
    last = source
    for node in after:
        with source.graph.inserting_after(last):
            last = source.graph.node_copy(node, lambda n: copies.get(n, n))
        last.meta["val"] = float_value(source).to(float_value(node).dtype)
        copies[node] = last
    return last
