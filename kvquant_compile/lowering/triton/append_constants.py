"""A layer's constants in the form that the append kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.feedback import STAGE_CHANNELS, UNITS
from kvquant_compile.codec.keys import channel_importance
from kvquant_compile.codec.nuq import COUNTED_LEVELS, cell_codes
from kvquant_compile.codec.spec import LayerTables
from kvquant_compile.lowering.remembered import Remembered
from kvquant_compile.lowering.triton.quantise_emit import channel_width
from kvquant_compile.lowering.triton.quantise_single import LANES


@dataclass(frozen=True, eq=False)
class AppendConstants:
    """Constants of one layer, on its device: H kv heads, channels padded to a power of two W.

    Attributes:
        key_channels: float32 [H, 5, W]: scale, its reciprocal, zero, weight, share of the weight.
        value_channels: float32 [H, 3, W]: gain, its reciprocal, offset.
        key_rows: float32 [H, 2]: norm, stretch.
        key_levels, value_levels: float32 [H, 2, L], midpoints and levels, up to 4 bits; above,
            int16 [H, 2, 512], code and level of every cell.
        key_feedback, value_feedback: float16 [H, 16 * stages, W]; empty where nothing is fed back.
        key_feedback_words, value_feedback_words: the same as int8 in units of 1 / 64, int32
            [H, stages - 1, W / 32, 32, 4]: what channel ``32 j + lane`` gets from four channels
            of a stage is a word.
    """

    key_channels: Tensor
    value_channels: Tensor
    key_rows: Tensor
    key_levels: Tensor
    value_levels: Tensor
    key_feedback: Tensor
    value_feedback: Tensor
    key_feedback_words: Tensor
    value_feedback_words: Tensor


_CONSTANTS: Remembered[AppendConstants] = Remembered()


def append_constants(tables: list[Tensor]) -> AppendConstants:
    """Constants of a layer, made once for its tables, on the device, and kept."""
    return _CONSTANTS.get(tables, lambda: _prepare(LayerTables(*tables)))


def _prepare(tables: LayerTables) -> AppendConstants:
    heads = tables.key_table.shape[0]
    keys = [
        _widened(tables.key_scale, 1.0), _widened(1 / tables.key_scale, 1.0),
        _widened(tables.key_zero), _widened(tables.key_weight),
        _widened(channel_importance(tables)),
    ]  # fmt: skip
    gain = _widened(tables.value_gain, 1.0)
    return AppendConstants(
        torch.stack(keys, 1),
        torch.stack([gain, 1 / gain, _widened(tables.value_offset)], 1),
        torch.stack([x.expand(heads) for x in (tables.key_norm, tables.key_stretch)], 1).float(),
        _levels(tables.key_table),
        _levels(tables.value_table),
        _feedback(tables.key_feedback),
        _feedback(tables.value_feedback),
        _feedback_words(tables.key_feedback),
        _feedback_words(tables.value_feedback),
    )


def _widened(x: Tensor, value: float = 0.0) -> Tensor:
    missing = channel_width(x.shape[-1]) - x.shape[-1]
    return torch.nn.functional.pad(x.float(), (0, missing), value=value)


def _levels(table: Tensor) -> Tensor:
    """Midpoints (the first unused) and levels, or codes and levels by cell."""
    levels = table.float()
    if table.shape[1] <= COUNTED_LEVELS:
        midpoints = (levels + levels.roll(1, 1)) / 2
        return torch.stack([midpoints, levels], 1).contiguous()
    codes = cell_codes(table)
    return torch.stack([codes.short(), table.short().gather(1, codes.long())], 1).contiguous()


def _feedback(matrix: Tensor) -> Tensor:
    return (_moves(matrix).float() / UNITS).to(torch.float16)


def _feedback_words(matrix: Tensor) -> Tensor:
    if matrix.numel() == 0:
        return matrix.to(torch.int32)
    moves = _moves(matrix)
    moves = moves.view(moves.shape[0], -1, 4, 4, moves.shape[-1] // LANES, LANES)
    words = moves[:, :-1].permute(0, 1, 4, 5, 2, 3)
    return words.clone(memory_format=torch.contiguous_format).view(torch.int32)[..., 0]


def _moves(matrix: Tensor) -> Tensor:
    """int8 [H, 16 * stages, W]. Only later stages are moved: what else a matrix may hold is left
    out."""
    if matrix.numel() == 0:
        return matrix
    dim = matrix.shape[-1]
    stage = torch.arange(dim, device=matrix.device) // STAGE_CHANNELS
    moves = matrix * (stage[:, None] < stage)
    padding = (0, channel_width(dim) - dim, 0, -dim % STAGE_CHANNELS)
    return torch.nn.functional.pad(moves, padding).contiguous()
