"""Masks that leave keys out: a causal mask, and what a query has chosen among its keys."""

from __future__ import annotations

import torch
from torch import fx

from kvquant_compile.capture.edit import add_op, later
from kvquant_compile.capture.markers import ATTEND, MASK
from kvquant_compile.capture.ops import op_name

_BOTH = ("__and__", "bitwise_and", "logical_and")
# Places of an attend marker's arguments.
_MASK_AT, _SLOPES_AT = 3, 10


def split_selections(gm: fx.GraphModule) -> None:
    """Attend markers whose mask is ``mask & chosen`` get the two apart, as mask and ``selected``.

    Only where one of both is a mask marker and the other is bool [B, 1, S, keys]; what else models
    do with a mask is left to those who read it.
    """
    for attend in gm.graph.find_nodes(op="call_function", target=ATTEND):
        parts = _factors(attend.args[_MASK_AT])
        masks = [part for part in parts if part.target is MASK]
        chosen = [part for part in parts if part.target is not MASK]
        if len(set(masks)) != 1 or not chosen or not all(map(_is_choice, chosen)):
            continue
        selected = chosen[0]
        for more in chosen[1:]:
            where = later(gm.graph, selected, more)
            selected = add_op(gm.graph, where, torch.ops.aten.logical_and.default, (selected, more))
        slopes, before, bias = (*attend.args[_SLOPES_AT:], None, None, None)[:3]
        if before is None:
            args = (*attend.args[:_MASK_AT], masks[0], *attend.args[_MASK_AT + 1 : _SLOPES_AT])
            attend.args = (*args, slopes, selected, bias)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _factors(mask: object) -> list[fx.Node]:
    """What a mask is the conjunction of; the mask itself where it is none."""
    if not isinstance(mask, fx.Node):
        return []
    if op_name(mask) in _BOTH:
        return [factor for part in mask.args for factor in _factors(part)]
    return [mask]


def _is_choice(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    return value.dtype is torch.bool and value.ndim == 4 and value.shape[1] == 1
