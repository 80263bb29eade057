"""A layer's constants in the form that the kernels read: fragment order, float16 pairs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import LayerTables
from kvquant_compile.lowering.remembered import Remembered
from kvquant_compile.lowering.triton.spec import table_bias


@dataclass(frozen=True, eq=False)
class Prepared:
    """Constants of one layer (H kv heads, P pairs), on the layer's device.

    Attributes:
        key_bytes, value_bytes: uint8 [H, max(16, 2**bits)], table entries plus their bias.
        key_words: int32 [H, groups, 2 or 3, 32, 4], see :func:`_key_words`.
        key_factor: float32 [H], what a key is larger than the kernel's half.
        offset_words: int32 [chunk, tile, groups, 2, 32, 4], cosines and sines of the offsets in
            a page.
        turns: int64 [P], frequency in turns a position, as a fraction of 2**64.
        rope_scale: float32 [P].
        gain, offset: float32 [H, value_dim].
        query_order: int32 [2 P], or empty.
        rotated: octets of pairs that turn.
    """

    key_bytes: Tensor
    value_bytes: Tensor
    key_words: Tensor
    key_factor: Tensor
    offset_words: Tensor
    turns: Tensor
    rope_scale: Tensor
    gain: Tensor
    offset: Tensor
    query_order: Tensor
    rotated: int


_PREPARED: Remembered[Prepared] = Remembered()


def prepared(layout: PageLayout, tables: list[Tensor], geometry: list[Tensor]) -> Prepared:
    """Constants of a layer, made once for its tables (this copies to the host) and kept."""
    return _PREPARED.get(tables[0], lambda: _prepare(layout, tables, geometry))


def _prepare(layout: PageLayout, tables: list[Tensor], geometry: list[Tensor]) -> Prepared:
    device, spec = tables[0].device, layout.spec
    host = LayerTables(*(t.cpu() for t in tables))
    _, order, frequencies, rope_scale = (g.cpu() for g in geometry)
    pairs = padded(layout.key_dim) // 2
    turning = frequencies.nonzero().flatten()
    rotated = 0 if turning.numel() == 0 else int(turning.max()) // 8 + 1
    scale, zero = (_width(x, 2 * pairs, v) for x, v in ((host.key_scale, 1.0), (host.key_zero, 0)))
    exponent = torch.ceil(torch.log2(scale.amax(1)))
    words = _key_words(scale, zero, exponent, spec.key_bits, spec.key_token_scale)
    still = torch.zeros(pairs)
    parts = {
        "key_bytes": _table_bytes(host.key_table, spec.key_bits),
        "value_bytes": _table_bytes(host.value_table, spec.value_bits),
        "key_words": words,
        "key_factor": torch.exp2(exponent + 9),
        "offset_words": _offset_words(frequencies, pairs, rotated),
        "turns": _turns(frequencies if frequencies.numel() else still),
        "rope_scale": rope_scale if rope_scale.numel() else still + 1,
        "gain": host.value_gain.float(),
        "offset": host.value_offset.float(),
        "query_order": order.to(torch.int32),
    }
    moved = {name: x.contiguous().to(device) for name, x in parts.items()}
    return Prepared(**moved, rotated=rotated)


def _width(x: Tensor, width: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x.float(), (0, width - x.shape[-1]), value=value)


def _table_bytes(table: Tensor, bits: int) -> Tensor:
    data = (table.to(torch.int32) + table_bias(bits)).to(torch.uint8)
    return torch.nn.functional.pad(data, (0, max(16 - data.shape[1], 0)))


def half_words(low: Tensor, high: Tensor) -> Tensor:
    """Two float tensors as float16 pairs in int32 words."""
    both = torch.stack([low, high], -1).to(torch.float16).contiguous()
    return both.view(torch.int32).squeeze(-1)


def _pair_index(groups: int) -> Tensor:
    """Pair of (group, lane, kh, kl) in fragment order: int64 [groups, 32, 2, 2]."""
    u, lane, kh, kl = (
        torch.arange(n).view([-1 if i == j else 1 for j in range(4)])
        for i, n in enumerate((groups, 32, 2, 2))
    )
    return 16 * u + 8 * kh + 2 * (lane % 4) + kl


def _key_words(
    scale: Tensor, zero: Tensor, exponent: Tensor, bits: int, token_scale: bool
) -> Tensor:
    """Words (a0, a1, b0, b1) of every group and lane: scales, centres, and zeros apart from the
    centres where keys have a token scale. A byte ``u`` becomes ``u 2**-24 scale + centre``, which
    is ``2**-9-exponent`` times the key."""
    pairs = scale.shape[1] // 2
    groups = -(-pairs // 16)
    small = scale / torch.exp2(exponent)[:, None]
    bias = table_bias(bits)
    if token_scale:
        kinds = [small * 2**15, -bias * small / 512, zero * small / 512]
    else:
        kinds = [small * 2**15, (zero - bias) * small / 512]
    index = _pair_index(groups).flatten()
    out = []
    for kind in kinds:
        x = torch.nn.functional.pad(kind.unflatten(1, (2, pairs)), (0, 16 * groups - pairs))
        x = x[:, :, index].view(-1, 2, groups, 32, 2, 2)  # head, member, group, lane, kh, kl
        words = half_words(x[..., 0], x[..., 1])
        out.append(words.permute(0, 2, 3, 1, 4).flatten(-2))
    return torch.stack(out, 2)


def _offset_words(frequencies: Tensor, pairs: int, rotated: int) -> Tensor:
    """Words (cos k0, cos k1, sin k0, sin k1) of every token row and lane."""
    groups = -(-rotated // 2)
    if groups == 0:
        return torch.zeros(1, dtype=torch.int32)
    lane = torch.arange(32)
    rows = [
        32 * chunk + 4 * (lane // 4) + 2 * tile + r
        for chunk in range(2)
        for tile in range(2)
        for r in range(2)
    ]
    token = torch.stack(rows).view(4, 1, 2, 32, 1, 1)
    padded_f = torch.nn.functional.pad(frequencies.double(), (0, max(16 * groups - pairs, 0)))
    angle = token * padded_f[_pair_index(groups)].view(1, groups, 1, 32, 2, 2)
    cos, sin = angle.cos(), angle.sin()
    words = [half_words(x[..., k, 0], x[..., k, 1]) for x in (cos, sin) for k in range(2)]
    return torch.stack(words, -1)


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
    """Shares of the history: enough programs to fill the device, at least four pages each."""
    if device.type != "cuda":
        return 3
    wanted = 3 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // programs, -(-pages // 4), 512))
