"""Which layer, which head, which channel hurts.

Layers by the divergence of the logits with one layer's keys or values quantised and all else exact,
through the model; heads and channels by their part of the expected loss, from calibration's
gradients, or of the squared error where there are none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvquant_compile.calib.observe import Observed
from kvquant_compile.evaluate.fits import Stored
from kvquant_compile.evaluate.run import Prepared
from kvquant_compile.evaluate.stored import KEYS, PARTS, Trip, round_trip
from kvquant_compile.mixed.choose import probe_windows
from kvquant_compile.mixed.measure import head_losses, measured_losses
from kvquant_compile.mixed.widths import Item
from kvquant_compile.progress import Progress

CHANNELS = 3


def layer_errors(prepared: Prepared, stored: Stored, bar: Progress) -> dict[str, Any]:
    """The report of one point, JSON-able; items in the order of the layers.

    Args:
        prepared: the model; calibration windows are what it is measured on.
        stored: the point's formats and tables; lossless layers are left out.
        bar: shows what is going on.
    """
    trips = _trips(stored)
    steps = bar.each("measure layers", list(trips), len(trips))
    windows = probe_windows(prepared.windows)
    losses = measured_losses(prepared.captured, stored.layers, trips, windows, steps)
    observed = prepared.stored(stored.layers)
    weighed = all(seen.key_gradients is not None for seen in observed.values())
    items = [
        {
            "layer": index,
            "part": part,
            "kl": losses[index, part][width],
            "heads": _heads(_shares(trip, observed[index], part, weighed)),
        }
        for ((index, part), width), trip in trips.items()
    ]
    return {"weights": "fisher" if weighed else "none", "items": items}


def _trips(stored: Stored) -> dict[tuple[Item, int], Trip]:
    """The point's own width is all there is; it is called 0."""
    found: dict[tuple[Item, int], Trip] = {}
    for plan in (layer.plan for layer in stored.layers):
        spec, tables = stored.formats[plan.index], stored.tables[plan.index]
        if tables is not None:
            for part in PARTS:
                found[(plan.index, part), 0] = round_trip(plan, spec, tables, part, tail=False)
    return found


def _shares(trip: Trip, seen: Observed, part: str, weighed: bool) -> Tensor:
    """[H, D], summing to 1."""
    if weighed:
        losses = head_losses(trip, seen, part)
    else:
        x = (seen.keys if part == KEYS else seen.values)[None].float()
        losses = (trip(x) - x)[0].square().mean(1)
    return losses / losses.sum().clamp_min(1e-30)


def _heads(shares: Tensor) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for head, row in enumerate(shares):
        worst = torch.topk(row, min(CHANNELS, len(row)))
        channels = [
            {"channel": int(c), "share": float(s)}
            for s, c in zip(worst.values, worst.indices, strict=True)
        ]
        out.append({"head": head, "share": float(row.sum()), "channels": channels})
    return out
