"""A layer's constants in the form that the C++ reads: float32, pairs in lane order.

*Lane order* of pairs is the order in which sixteen lanes of a fragment give them, four at a time:
place ``16 u + 8 kh + 4 kl + t`` holds pair ``16 u + 8 kh + 2 t + kl``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import PAGE_TOKENS, LayerTables
from kvquant_compile.lowering.remembered import Remembered


@dataclass(frozen=True, eq=False)
class CppConstants:
    """Constants of one layer (H kv heads, P pairs), on the CPU, contiguous.

    Attributes:
        key_table, value_table: float32 [H, 256], levels, repeated up to sixteen entries.
        key_scale: float32 [H, P], of member a.
        key_ratio: float32 [H, P], scale of member b over it.
        key_zero: float32 [H, 2, P].
        key_inverse: float32 [H, 2 P], one over the scale of member a, by channel in pair order.
        gain, offset: float32 [H, value_dim].
        steps: int64 [P], frequency in turns a position, as a fraction of 2**64.
        rope_scale: float32 [P].
        offsets: float32 [4, 4, turning, 2, 16], cosines and sines of the places of a page.
        query_channels: int64 [2 P], the model's channel at every place of lane order.
        pair_channels: int64 [2 P], the pair-order channel at every place of lane order.
        turning: leading groups of four pairs that turn.
    """

    key_table: Tensor
    value_table: Tensor
    key_scale: Tensor
    key_ratio: Tensor
    key_zero: Tensor
    key_inverse: Tensor
    gain: Tensor
    offset: Tensor
    steps: Tensor
    rope_scale: Tensor
    offsets: Tensor
    query_channels: Tensor
    pair_channels: Tensor
    turning: int


_CONSTANTS: Remembered[CppConstants] = Remembered()


def cpp_constants(layout: PageLayout, tables: list[Tensor], geometry: list[Tensor]) -> CppConstants:
    """Constants of a layer, made once for its tables and kept as long as they live."""
    anchors = [*tables, *geometry]
    return _CONSTANTS.get(anchors, lambda: _make(layout, tables, geometry), layout)


def _make(layout: PageLayout, tables: list[Tensor], geometry: list[Tensor]) -> CppConstants:
    _, order, frequencies, rope_scale = geometry
    known = LayerTables(*tables)
    pairs = padded(layout.key_dim) // 2
    pair = lane_order(pairs)
    scale, zero = (x.float().unflatten(1, (2, pairs)) for x in (known.key_scale, known.key_zero))
    turning = _turning(frequencies, pairs)
    still = torch.zeros(pairs)
    frequencies = (frequencies if frequencies.numel() else still)[pair]
    channels = order if order.numel() else torch.arange(2 * pairs)
    both = torch.cat([pair, pair + pairs])
    made = {
        "key_table": repeated(known.key_table),
        "value_table": repeated(known.value_table),
        "key_scale": scale[:, 0, pair],
        "key_ratio": (scale[:, 1] / scale[:, 0])[:, pair],
        "key_zero": zero[:, :, pair],
        "key_inverse": 1 / scale[:, 0].repeat(1, 2),
        "gain": known.value_gain.float(),
        "offset": known.value_offset.float(),
        "steps": turn_steps(tuple(frequencies.tolist())),
        "rope_scale": (rope_scale if rope_scale.numel() else still + 1)[pair],
        "offsets": _offsets(tuple(frequencies.tolist()), turning),
        "query_channels": channels[both],
        "pair_channels": both,
    }
    return CppConstants(**{name: x.contiguous() for name, x in made.items()}, turning=turning)


def lane_order(pairs: int) -> Tensor:
    """The pair at every place of lane order, int64 [P]; P a multiple of 8."""
    place = torch.arange(pairs)
    return place // 8 * 8 + 2 * (place % 4) + place % 8 // 4


def _turning(frequencies: Tensor, pairs: int) -> int:
    """Groups of four pairs up to the last that turns, whole fragments of sixteen pairs."""
    found = frequencies.nonzero().flatten()
    if found.numel() == 0:
        return 0
    return min((int(found.max()) // 16 + 1) * 4, pairs // 4)


def repeated(table: Tensor) -> Tensor:
    """Levels as float32 [H, 256]: by any bits above the code, up to the fourth."""
    levels = table.float()
    levels = levels.repeat(1, max(1, 16 // levels.shape[1]))
    return torch.nn.functional.pad(levels, (0, 256 - levels.shape[1]))


@functools.lru_cache(maxsize=64)
def turn_steps(frequencies: tuple[float, ...]) -> Tensor:
    """Frequencies in 2**-64 turns a position, modulo a turn, as signed int64."""
    wrapped = (round(f / math.tau * 2.0**64) % 2**64 for f in frequencies)
    return torch.tensor([x - 2**64 if x >= 2**63 else x for x in wrapped], dtype=torch.int64)


@functools.lru_cache(maxsize=64)
def _offsets(frequencies: tuple[float, ...], turning: int) -> Tensor:
    """Cosines and sines of a page's places: token ``16 n + 4 g + set``, lane ``4 g + t``."""
    place = torch.arange(PAGE_TOKENS).view(4, 4, 4).transpose(1, 2)  # quarter, set, g
    turned = torch.tensor(frequencies[: 4 * turning], dtype=torch.float64).view(-1, 4)
    angle = place[:, :, None, :, None] * turned[:, None]  # quarter, set, quad, g, t
    both = torch.stack([angle.cos(), angle.sin()], 3)
    return both.flatten(-2).float().contiguous()
