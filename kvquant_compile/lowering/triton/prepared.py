"""A layer's constants in the form that the kernels read: fragment order, float16 pairs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import LayerTables
from kvquant_compile.lowering.half_words import BYTES_FROM, SUBNORMAL, half_words
from kvquant_compile.lowering.remembered import Remembered
from kvquant_compile.lowering.series import column_coefficients, explicit_groups
from kvquant_compile.lowering.triton.spec import TERMS, table_bias, table_row, value_bias
from kvquant_compile.lowering.turns import SMALL, Turns, fragment_pairs, pair_scale


@dataclass(frozen=True, eq=False)
class Prepared:
    """Constants of one layer (H kv heads, P pairs), on the layer's device.

    Attributes:
        key_bytes: uint8 [H, table_row(bits)], table entries plus their bias; up to 4 bits sixteen
            of them, four times.
        value_bytes: the same as signed bytes, 7-bit ones plus a bias at 4 bits.
        key_words: int32 [H, groups, 3, 32, 4], see :func:`_series_words` and :func:`_slot_words`.
        turn_words: int32 [H or 1, ...], what explicit keys are turned by, see :class:`Turns`.
        zero_words: int32 [H, ...], turned zeros, where keys have a token scale and no slots.
        query_terms: float32 [H, 16 groups, 2, 2], factors of a query's member and of the pair's
            other one, by column.
        key_unit: float32 [H], what a product of a query and scaled keys is to be multiplied by.
        turns: int64 [P], frequency in turns a position, as a fraction of 2**64.
        rope_scale: float32 [P].
        gain, offset: float32 [H, value_dim].
        query_order: int32 [2 P], or empty.
        rotated: octets of pairs that turn.
        stretched: whether any pair has a RoPE scale other than 1.
        explicit: groups of pairs whose keys are made before products, and turned.
    """

    key_bytes: Tensor
    value_bytes: Tensor
    key_words: Tensor
    turn_words: Tensor
    zero_words: Tensor
    query_terms: Tensor
    key_unit: Tensor
    turns: Tensor
    rope_scale: Tensor
    gain: Tensor
    offset: Tensor
    query_order: Tensor
    rotated: int
    stretched: bool
    explicit: int


_PREPARED: Remembered[Prepared] = Remembered()


def prepared(layout: PageLayout, tables: list[Tensor], geometry: list[Tensor]) -> Prepared:
    """Constants of a layer, made once for its tables (this copies to the host) and kept."""
    anchors = [*tables, *geometry]
    return _PREPARED.get(anchors, lambda: _prepare(layout, tables, geometry), layout)


def _prepare(layout: PageLayout, tables: list[Tensor], geometry: list[Tensor]) -> Prepared:
    device, spec = tables[0].device, layout.spec
    host = LayerTables(*(t.cpu() for t in tables))
    _, order, frequencies, rope_scale = (g.cpu() for g in geometry)
    pairs = padded(layout.key_dim) // 2
    groups = -(-pairs // 16)
    turning = frequencies.nonzero().flatten()
    rotated = 0 if turning.numel() == 0 else int(turning.max()) // 8 + 1
    unit = torch.exp2(torch.ceil(torch.log2(host.key_scale.double().amax(1))))
    scale = _members(host.key_scale.double() / unit[:, None], pairs, 1.0)
    zero = _members(host.key_zero.double(), pairs, 0.0)
    still = torch.zeros(pairs)
    angles = pad((frequencies if frequencies.numel() else still).double(), (0, 16 * groups - pairs))
    bias = table_bias(spec.key_bits)
    nothing = torch.zeros(1, dtype=torch.int32)
    turned, zeros = nothing, nothing
    if spec.key_slots:
        explicit, held = groups, torch.ones(layout.heads, 16 * groups)
        words = _slot_words(scale, zero, bias, spec.key_token_scale)
        if rotated:
            circle = Turns.make(angles, -(-rotated // 2), neighbours=True).circle()
            turned = circle.movedim(3, -2).flatten(-2)  # .., lane, (cosine and sine, half)
    else:
        explicit, held = explicit_groups(angles, TERMS), pair_scale(scale)
        words = _series_words(scale, zero, pairs, bias, spec.key_token_scale)
        if explicit:
            turns = Turns.make(angles, explicit, neighbours=True)
            turned = turns.affine(scale, 0 * zero if spec.key_token_scale else zero, bias)
            zeros = turns.zeros(scale, zero) if spec.key_token_scale else nothing
    parts = {
        "key_bytes": _table_bytes(host.key_table, spec.key_bits, bias),
        "value_bytes": _table_bytes(host.value_table, spec.value_bits, value_bias(spec.value_bits)),
        "key_words": words,
        "turn_words": turned,
        "zero_words": zeros,
        "query_terms": column_coefficients(angles, held, explicit)[:, :, :TERMS].float(),
        "key_unit": unit.float(),
        "turns": _turns(frequencies if frequencies.numel() else still),
        "rope_scale": rope_scale if rope_scale.numel() else still + 1,
        "gain": host.value_gain.float(),
        "offset": host.value_offset.float(),
        "query_order": order.to(torch.int32),
    }
    moved = {name: x.contiguous().to(device) for name, x in parts.items()}
    stretched = rotated > 0 and bool((rope_scale != 1).any())
    return Prepared(**moved, rotated=rotated, stretched=stretched, explicit=explicit)


def _members(x: Tensor, pairs: int, value: float) -> Tensor:
    """[H, up to 2 P] -> [H, 2 members of whole groups of sixteen pairs]."""
    x = pad(x, (0, 2 * pairs - x.shape[-1]), value=value)
    return pad(x.unflatten(1, (2, pairs)), (0, -pairs % 16), value=value).flatten(1)


def _table_bytes(table: Tensor, bits: int, bias: int) -> Tensor:
    data = (table.to(torch.int32) + bias).to(torch.uint8)
    if bits <= 4:
        return pad(data, (0, 16 - data.shape[1])).repeat(1, 4)
    return pad(data, (0, table_row(bits) - data.shape[1]))


def _words(x: Tensor) -> Tensor:
    """Halves (a0, a1, b0, b1), by member and half of a group, of every lane: float64
    [H, 2 members of pairs] -> int32 [H, groups, 32, 4]."""
    pair = fragment_pairs(x.shape[1] // 32)[:, torch.arange(32) % 4]
    words = half_words(*x.unflatten(1, (2, -1))[:, :, pair].unbind(-1))
    return words.permute(0, 2, 3, 1, 4).flatten(-2)


def _series_words(scale: Tensor, zero: Tensor, pairs: int, bias: int, token_scale: bool) -> Tensor:
    """Scales, and for either member the fragment of two kinds of rows, words (half, kind): what a
    byte, as 1024 + u, is to be moved by to its zero, twice, or to its centre and from there to its
    zero. A last group of eight pairs has one fragment, whose halves are its members."""
    excess = torch.full_like(zero, -float(BYTES_FROM + bias))
    rows = (excess, zero) if token_scale else (excess + zero,) * 2
    a0, a1, b0, b1 = torch.stack([_words(x) for x in rows], -1).unbind(-2)
    if pairs % 16:
        a1[:, -1] = b0[:, -1]
    fragments = [torch.cat(halves, -1) for halves in ((a0, a1), (b0, b1))]
    return torch.stack([_words(scale), *fragments], 2)


def _slot_words(scale: Tensor, zero: Tensor, bias: int, token_scale: bool) -> Tensor:
    """Scales, centres, and zeros apart from the centres where keys have a token scale. A byte, as
    ``u 2**-24``, becomes ``u 2**-24 scale + centre``, which is as small as turned keys are."""
    small = scale * SMALL
    centre = -bias if token_scale else zero - bias
    kinds = (small / SUBNORMAL, centre * small, zero * small)
    return torch.stack([_words(x) for x in kinds], 2)


def _turns(frequencies: Tensor) -> Tensor:
    """Frequencies in 2**-64 turns a position, modulo a turn, as signed numbers."""
    out = []
    for f in frequencies.double().tolist():
        turn = int(f / math.tau * 2.0**64) % 2**64
        out.append(turn - 2**64 if turn >= 2**63 else turn)
    return torch.tensor(out, dtype=torch.int64)


def page_addresses(slabs: list[Tensor]) -> Tensor:
    """Byte address of every page by id: int64 [pages], on the slabs' device."""
    spans = tuple((slab.data_ptr(), slab.shape[0]) for slab in slabs)
    return _addresses(spans, slabs[0][0].nbytes, slabs[0].device)


@functools.lru_cache(maxsize=4096)
def _addresses(spans: tuple[tuple[int, int], ...], page_bytes: int, device: torch.device) -> Tensor:
    parts = [
        torch.arange(count, dtype=torch.int64, device=device) * page_bytes + pointer
        for pointer, count in spans
    ]
    return torch.cat(parts)


def split_count(programs: int, pages: int, device: torch.device) -> int:
    """Shares of the history: two programs a multiprocessor, which is what registers leave room for
    (three of fewer registers each spill, and took a fifth longer), at least four pages each."""
    if device.type != "cuda":
        return 3
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // programs, -(-pages // 4), 512))
