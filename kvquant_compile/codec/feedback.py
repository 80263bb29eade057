"""Coding with error feedback: later channels make up for the errors of earlier ones.

What a value's error ``e`` [D] costs is ``e' M e`` with M the second moment of the loss gradient.
Where M is far from diagonal, coding channels in a few stages and moving each stage's error, as M
prescribes, onto the channels still to be coded costs much less than nearest levels do (the idea
of GPTQ, arXiv 2210.17323, applied to cached vectors). Nothing more is stored.

Errors are cut to eighths of a table unit and the matrix to 1 / 64, so every sum is an integer
below 2**24 in units of 1 / 512: exact in float32 in any order. Codes are therefore the same
whether tokens come one by one or at once, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.codec.nuq import levels_of, nearest_codes

STAGE_CHANNELS = 16
UNITS = 64
_ERROR_STEPS = 8
_ERROR_LIMIT = 63.0


def feedback_codes(x: Tensor, table: Tensor, feedback: Tensor, exact: Tensor) -> Tensor:
    """Codes of ``x``, stage by stage of ``STAGE_CHANNELS`` channels.

    Args:
        x: float32 [B, H, N, D], in table units.
        table: int8 [H, L], ascending.
        feedback: int8 [H, D, D], see ``LayerTables.value_feedback``.
        exact: index [B, H, N, m] of channels whose slot makes them exact: no error to pass on.

    Returns:
        uint8 [B, H, N, D].
    """
    dim = x.shape[-1]
    matrix = feedback.float() / UNITS
    passes_on = torch.ones_like(x).scatter_(-1, exact.long(), 0.0)
    moved = torch.zeros_like(x)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for start in range(0, dim, STAGE_CHANNELS):
        stop = min(start + STAGE_CHANNELS, dim)
        wanted = x[..., start:stop] + moved[..., start:stop]
        chosen = nearest_codes(wanted, table)
        codes[..., start:stop] = chosen
        if stop < dim:
            error = _on_grid(wanted - levels_of(chosen, table)) * passes_on[..., start:stop]
            moved[..., stop:] += error @ matrix[:, start:stop, stop:]
    return codes


def _on_grid(error: Tensor) -> Tensor:
    """Errors in eighths of a table unit, at most ``_ERROR_LIMIT``; NaN passes nothing on."""
    steps = (torch.nan_to_num(error, nan=0.0) * _ERROR_STEPS).round_() / _ERROR_STEPS
    return steps.clamp_(-_ERROR_LIMIT, _ERROR_LIMIT)
