"""A layer's constants as the Gluon kernel reads them: one block of bytes per head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import LayerTables
from kvquant_compile.lowering.gluon.memory import Constants
from kvquant_compile.lowering.gluon.slots import HEADROOM
from kvquant_compile.lowering.gluon.spec import COLUMN_GROUP, GluonSpec
from kvquant_compile.lowering.gluon.visibility import TOKENS
from kvquant_compile.lowering.half_words import BYTES_FROM, SUBNORMAL, half_words
from kvquant_compile.lowering.series import (
    MOST_TERMS,
    column_coefficients,
    explicit_groups,
    series_coefficients,
)
from kvquant_compile.lowering.triton.spec import table_bias, value_bias
from kvquant_compile.lowering.turns import SMALL, Turns, fragment_pairs, pair_scale


@dataclass(frozen=True, eq=False)
class GluonConstants:
    """Constants of one layer (H kv heads, P pairs), on the layer's device.

    Attributes:
        block: int32 [H, size / 4], see :class:`~.memory.Constants`.
        key_unit: float32 [H], what a product of a unit query and scaled keys is to be multiplied
            by.
        coefficients: float32 [H, P, 8, 2], see :func:`column_coefficients`.
        rope_scale: float32 [P].
        turns: int32 [P, 2], frequencies in turns a position, as 64-bit fractions.
        query_order: int32 [2 P], or empty.
        gain, offset: float32 [H, value_dim].
        explicit: groups of pairs that are rotated explicitly.
        terms: of the others' series.
        rotates, stretched: as in :class:`GluonSpec`.
    """

    block: Tensor
    key_unit: Tensor
    coefficients: Tensor
    turns: Tensor
    rope_scale: Tensor
    query_order: Tensor
    gain: Tensor
    offset: Tensor
    explicit: int
    terms: int
    rotates: bool
    stretched: bool


def series_terms(columns: int) -> int:
    """Terms that so many queries of a kv head can have: they share eight columns."""
    return MOST_TERMS // columns if columns <= COLUMN_GROUP // 2 else 2


def column_groups(columns: int) -> int:
    """Groups of columns of a program that works on so many queries of a kv head."""
    return 1 if columns <= COLUMN_GROUP else 2


def gluon_constants(
    layout: PageLayout, tables: list[Tensor], geometry: list[Tensor], columns: int
) -> GluonConstants:
    """Prepare a layer's constants for so many queries a kv head; copies to the host."""
    device = tables[0].device
    host = LayerTables(*(t.cpu() for t in tables))
    order, frequencies, rope_scale = (x.cpu() for x in geometry[1:])
    pairs = padded(layout.key_dim) // 2
    rotates = bool((frequencies != 0).any())
    terms = series_terms(columns) if rotates else 2
    groups = column_groups(columns)
    explicit = explicit_groups(frequencies, terms) if rotates else 0
    if frequencies.numel() == 0:
        frequencies, rope_scale = torch.zeros(pairs), torch.ones(pairs)
    stretched = rotates and bool((rope_scale != 1).any())
    spec = GluonSpec(layout, rotates, explicit, groups, False, False, False, stretched, terms=terms)
    scale, zero = (_width(x, 2 * pairs, v) for x, v in ((host.key_scale, 1.0), (host.key_zero, 0)))
    unit = torch.exp2(torch.ceil(torch.log2(scale.amax(1))))
    sections = _sections(spec, host, frequencies.double(), scale / unit[:, None], zero, unit)
    block = torch.cat([x.reshape(layout.heads, -1) for x in sections], 1)
    assert block.shape[1] * 4 == Constants(spec).size
    held = pair_scale(scale / unit[:, None])
    return GluonConstants(
        block.contiguous().to(device), unit.float().to(device),
        column_coefficients(frequencies, held, explicit).float().to(device),
        _turn_fractions(frequencies.double()).to(device), rope_scale.float().to(device),
        order.to(torch.int32).to(device),
        host.value_gain.float().contiguous().to(device),
        host.value_offset.float().contiguous().to(device), explicit, terms, rotates, stretched,
    )  # fmt: skip


def _sections(
    spec: GluonSpec, host: LayerTables, frequencies: Tensor, scale: Tensor, zero: Tensor,
    unit: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The block's sections in order, int32 [H, ...]."""
    heads = scale.shape[0]
    out = []
    if spec.explicit:
        turns = Turns.make(frequencies, spec.explicit, neighbours=spec.neighbours)
        out.append(_turned(spec, turns, scale, zero))
    if spec.zero_fragments:
        out.append(turns.zeros(scale, zero))
    if spec.rotates:
        out.append(_turn_words(spec, frequencies).expand(heads, -1, -1))
    out.append(_scale_words(spec, scale, zero))
    bits = (spec.layout.spec.key_bits, spec.layout.spec.value_bits)
    out += [
        _table_bytes(host.key_table, table_bias(bits[0])),
        _table_bytes(host.value_table, value_bias(bits[1])),
    ]
    if spec.terms > 2:
        out.append(_polynomials(spec).expand(heads, -1))
    if spec.layout.spec.key_slots:
        out.append(_outlier_table(spec, frequencies, scale, unit))
    return out


def _turned(spec: GluonSpec, turns: Turns, scale: Tensor, zero: Tensor) -> Tensor:
    """What explicit keys are turned by; zeros apart under token scales."""
    if not spec.neighbours:
        words = turns.circle()
        return words.expand(scale.shape[0], *words.shape)
    bias = table_bias(spec.layout.spec.key_bits)
    return turns.affine(scale, 0 * zero if spec.scaled else zero, bias)


def _width(x: Tensor, width: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x.double(), (0, width - x.shape[-1]), value=value)


def _table_bytes(table: Tensor, bias: int) -> Tensor:
    """Sixteen bytes a head, four times: entries plus their bias."""
    data = (table.to(torch.int32) + bias).to(torch.uint8)
    return torch.nn.functional.pad(data, (0, 16 - data.shape[1])).repeat(1, 4).view(torch.int32)


def _turn_fractions(frequencies: Tensor) -> Tensor:
    """Frequencies in turns a position as 64-bit fractions, (high, signed low): int32 [P, 2]."""
    fractions = []
    for f in frequencies.tolist():
        whole = round(f / math.tau * 2.0**64) % 2**64
        low = (whole & 0xFFFFFFFF) - (1 << 32 if whole & 0x80000000 else 0)
        high = ((whole - low) >> 32) % 2**32
        fractions.append((high - (1 << 32) if high >= 1 << 31 else high, low))
    return torch.tensor(fractions, dtype=torch.int64).to(torch.int32)


def _turn_words(spec: GluonSpec, frequencies: Tensor) -> Tensor:
    """Frequencies of the two pairs of every word of a page's angles: int32 [words, 4]."""
    index = fragment_pairs(spec.key_groups).permute(0, 2, 1, 3)  # group, half, t, low
    return _turn_fractions(frequencies)[index].flatten(-2).reshape(-1, 4)


def _scale_words(spec: GluonSpec, scale: Tensor, zero: Tensor) -> Tensor:
    """Words [H, groups, 3, t, 4] of scales and zeros; ``scale`` over the head's unit.

    Explicit: a byte u becomes ``u 2**-24 scale + centre``, member by member; nothing where
    neighbours share rotations, which contain that. Series: scales of the fragment's four words,
    then the zeros of either member less what bytes are too large by, both rows alike; under token
    scales what bytes are too large by, and the zeros.
    """
    heads, bits = scale.shape[0], spec.layout.spec.key_bits
    pair = fragment_pairs(spec.key_groups)
    s, z = (x.unflatten(1, (2, spec.pairs))[:, :, pair] for x in (scale, zero))
    out = torch.zeros(heads, spec.key_groups, 3, 4, 4, dtype=torch.int32)
    shift = 0 if spec.scaled else z
    centre = (shift - table_bias(bits)) * s * SMALL
    factor = s * SMALL / SUBNORMAL
    explicit = torch.stack([half_words(*x.unbind(-1)) for x in (factor, centre)], -2)
    explicit = explicit.permute(0, 2, 1, 3, 4, 5).flatten(-2)  # head, group, member, t, kind half
    series = half_words(*s.unbind(-1)).permute(0, 2, 3, 1, 4).flatten(-2)
    excess = torch.full_like(z, -float(BYTES_FROM + table_bias(bits)))
    rows = (excess, z) if spec.scaled else (z + excess, z + excess)
    words = torch.stack([half_words(*x.unbind(-1)) for x in rows], -1)
    zeros = words.flatten(-2).permute(0, 2, 1, 3, 4)
    n = spec.explicit
    if not spec.neighbours:
        out[:, :n, :2] = explicit[:, :n]
    out[:, n:, 0] = series[:, n:]
    out[:, n:, 1:] = zeros[:, n:]
    return out


def _polynomials(spec: GluonSpec) -> Tensor:
    """Chebyshev's polynomials of the lanes' tokens, float32 as int32 [words]; see
    :attr:`Constants.polynomials`."""
    offset = (torch.arange(8)[:, None] * 4 + torch.tensor(TOKENS) - 32).double() / 32
    values = torch.cos(torch.arange(spec.terms).view(-1, 1, 1) * torch.arccos(offset))
    ordered = values.view(spec.span, 2, 8, 8).permute(0, 2, 3, 1)  # lane, g, token, parity
    return ordered.float().contiguous().view(torch.int32).flatten()


def _outlier_table(spec: GluonSpec, frequencies: Tensor, scale: Tensor, unit: Tensor) -> Tensor:
    """(frequency, its low word, phase, factor) of every channel in pair order: int32 [H, 2 P, 4].

    A phase of a quarter turn selects member b. The factor takes a residual to the units of the
    queries.
    """
    heads = unit.shape[0]
    out = torch.zeros(heads, 2 * spec.pairs, 4, dtype=torch.int32)
    out[:, :, :2] = _turn_fractions(frequencies).repeat(2, 1)
    out[:, spec.pairs :, 2] = 1 << 30
    explicit = torch.arange(spec.pairs) < 16 * spec.explicit
    first = torch.ones(spec.pairs)
    if spec.terms == 2:  # slots meet the first of the terms
        first = 1 / series_coefficients(frequencies)[:, 0].float()
    held = pair_scale(scale) if spec.neighbours else torch.ones(heads, 1)
    share = torch.where(explicit, SMALL / held, first).repeat(1, 2) / HEADROOM
    out[:, :, 3] = (share / unit[:, None]).float().contiguous().view(torch.int32)
    return out
