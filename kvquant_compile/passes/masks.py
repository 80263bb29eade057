"""What each attend marker says about its layer: heads, scale, soft-cap, window, sinks."""

from __future__ import annotations

import torch
from torch import fx

from kvquant_compile.capture.markers import MASK
from kvquant_compile.capture.ops import CASTS, op_name
from kvquant_compile.capture.reference import CAUSAL, CHUNKED, SLIDING
from kvquant_compile.capture.source_lines import source_line
from kvquant_compile.errors import UnsupportedLayerError
from kvquant_compile.passes.taint import float_value
from kvquant_compile.plan import AttendPlan

_END = 2**63 - 1


def attend_plan(attend: fx.Node, logits: fx.Node | None = None) -> AttendPlan:
    """Read an attend marker; ``logits`` [B, Hq, S, extent] are what its bias was proved to be.

    Raises:
        UnsupportedLayerError: its mask is no causal, sliding or chunked mask marker.
    """
    query, _, _, mask, sinks, layer, scaling, softcap, window, causal, *more = attend.args
    slopes, selected, bias = (*more, None, None, None)[:3]
    assert isinstance(query, fx.Node)
    assert (bias is None) == (logits is None)
    of_queries = isinstance(sinks, fx.Node) and float_value(sinks).ndim > 1
    where = f"layer {layer}, {source_line(attend) or 'of unknown source'}"
    kind, size = mask_window(mask, causal=bool(causal), window=window, where=where)
    return AttendPlan(
        query_heads=int(float_value(query).shape[1]),
        scale=float(scaling),  # type: ignore[arg-type]
        softcap=float(softcap),  # type: ignore[arg-type]
        window=size if kind == SLIDING else 0,
        chunk=size if kind == CHUNKED else 0,
        sink_logits=sinks is not None and not of_queries,
        position_bias=slopes is not None,
        selects=selected is not None,
        query_sinks=of_queries,
        bias_extent=0 if logits is None else int(float_value(logits).shape[3]),
    )


def mask_window(mask: object, *, causal: bool, window: object, where: str) -> tuple[str, int]:
    """The kind of an attend marker's mask and its window or chunk; 0 for plain causal attention.

    The mask decides: models pass a window beside masks that do not apply it, and the other way
    round.

    Raises:
        UnsupportedLayerError: there is no mask marker, or one of another kind.
    """
    mask = _unsliced(mask)
    marked = isinstance(mask, fx.Node) and mask.target is MASK
    kind = mask.args[4] if isinstance(mask, fx.Node) and marked else None
    if isinstance(mask, fx.Node) and kind in (CAUSAL, SLIDING, CHUNKED):
        return str(kind), int(mask.args[5])  # type: ignore[arg-type]
    raise UnsupportedLayerError(
        "an attention layer cannot be matched",
        where=where,
        why="it attends without a causal, sliding-window or chunked mask"
        f" (mask {mask}, kind {kind}, causal={causal}, window={window})",
        do="Bidirectional and custom masks are not supported.",
    )


def _unsliced(mask: object) -> object:
    """A mask behind slices that take all of it (gemma4 slices by ``logits_to_keep``), and behind
    moves to the device where it is (hooks of a device map)."""
    while isinstance(mask, fx.Node):
        if op_name(mask) in CASTS and float_value(mask).dtype == torch.bool:
            mask = mask.args[0]
            continue
        if mask.target is not torch.ops.aten.slice.Tensor:
            break
        source, *bounds = mask.args
        _, start, end = (*bounds, *(0, 0, None)[len(bounds) :])[:3]
        if start not in (0, None) or end not in (None, _END):
            break
        mask = source
    return mask
