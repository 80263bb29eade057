"""The bytes of a page: 64 tokens of one kv head, keys and values together.

A page is the unit of allocation, of loads and of scheduling. Its sections, in order (each a
multiple of 16 bytes; sections of an absent feature are empty):

====================  =========================================================
key codes             fragment order, see :mod:`.fragments`; 8 D b bytes
key slot channels     [slot][token], 1 byte (2 above 256 channels)
key slot residuals    [slot][token] float16
key token scales      [token] float16
value codes           fragment order
value scale, zero     [token][2] float16
value slot channels   as for keys
value slot residuals  as for keys
====================  =========================================================

Exact tokens lie outside the pages (:mod:`kvquant_compile.lowering.recent`).

A lossless page holds the keys [64, D] and the values [64, D] in the model's own dtype.
Keys are stored in *pair order*: channel ``member * P + pair``, pairs by falling frequency (see
:func:`pair_order`), so that one layout serves every rotary spelling. Head sizes that are no
multiple of 16 are padded, and the padding is counted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.fragments import (
    key_from_fragments,
    key_to_fragments,
    pack_words,
    unpack_words,
    value_from_fragments,
    value_to_fragments,
)
from kvquant_compile.codec.keys import KeyCodes
from kvquant_compile.codec.slots import index_dtype
from kvquant_compile.codec.spec import LOSSLESS, PAGE_TOKENS, CodecSpec
from kvquant_compile.codec.values import ValueCodes

_FORMAT = re.compile(
    r"k(\d+)v(\d+) slots(\d+)/(\d+) scale([01]) sink(\d+) heads(\d+) dim(\d+)/(\d+) raw(\d+)"
    r"(?: recent(\d+))?"
)


def padded(dim: int) -> int:
    """Channels that the codes of a head of ``dim`` channels occupy."""
    return -(-dim // 16) * 16


@dataclass(frozen=True)
class PageLayout:
    """The static byte layout of one layer's pages.

    Attributes:
        spec: the codec's static format.
        heads: kv heads.
        key_dim, value_dim: channels per head.
        itemsize: bytes of an element of the model's dtype (sinks and lossless pages).
    """

    spec: CodecSpec
    heads: int
    key_dim: int
    value_dim: int
    itemsize: int

    def __str__(self) -> str:
        """The format string that the ops of a rewritten graph carry."""
        s = self.spec
        return (
            f"k{s.key_bits}v{s.value_bits} slots{s.key_slots}/{s.value_slots} "
            f"scale{int(s.key_token_scale)} sink{s.sink_tokens} heads{self.heads} "
            f"dim{self.key_dim}/{self.value_dim} raw{self.itemsize}"
            + (f" recent{s.recent_tokens}" if s.recent_tokens else "")
        )

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: str) -> PageLayout:
        """Inverse of ``str``; raises ValueError on anything else."""
        match = _FORMAT.fullmatch(text)
        if match is None:
            raise ValueError(f"not a page format: {text!r}")
        kb, vb, ks, vs, scale, sink, heads, dk, dv, raw, recent = map(int, match.groups("0"))
        spec = CodecSpec(kb, vb, ks, vs, bool(scale), sink, recent)
        return PageLayout(spec, heads, dk, dv, raw)

    @property
    def sections(self) -> dict[str, int]:
        """Name -> bytes of every section of a page of one head, in storage order."""
        s, n = self.spec, PAGE_TOKENS
        if s.lossless:
            return {
                "keys": n * padded(self.key_dim) * self.itemsize,
                "values": n * self.value_dim * self.itemsize,
            }
        wide_k, wide_v = (2 if d > 256 else 1 for d in (self.key_dim, self.value_dim))
        return {
            "key_codes": n * padded(self.key_dim) * s.key_bits // 8,
            "key_slot_index": n * s.key_slots * wide_k,
            "key_slot_residual": 2 * n * s.key_slots,
            "key_token_scale": 2 * n * int(s.key_token_scale),
            "value_codes": n * padded(self.value_dim) * s.value_bits // 8,
            "value_scale_zero": 4 * n,
            "value_slot_index": n * s.value_slots * wide_v,
            "value_slot_residual": 2 * n * s.value_slots,
        }

    @functools.cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Name -> (first byte, end) of every section."""
        out, at = {}, 0
        for name, size in self.sections.items():
            out[name] = (at, at + size)
            at += size
        return out

    @functools.cached_property
    def page_bytes(self) -> int:
        """Bytes of a page of one head."""
        return sum(self.sections.values())

    @property
    def kind(self) -> str:
        """A short name."""
        return f"k{self.spec.key_bits}v{self.spec.value_bits}"

    @property
    def lossless(self) -> bool:
        """Whether pages hold raw keys and values."""
        return self.spec.lossless

    @property
    def sink_tokens(self) -> int:
        """Exact leading tokens."""
        return self.spec.sink_tokens

    @property
    def ring(self) -> int:
        """Rows for the exact last tokens."""
        return self.spec.recent_tokens

    @property
    def late(self) -> int:
        """Last tokens that reach the pages later: none, those in the ring are there already."""
        return 0

    @property
    def exact_rows(self) -> int:
        """Rows of the exact tokens of one sequence; the last says what the ring holds."""
        return self.spec.sink_tokens + (self.ring + 1 if self.ring else 0)

    @property
    def exact_width(self) -> int:
        """Elements of a row: a key in pair order and a value."""
        return padded(self.key_dim) + self.value_dim

    @property
    def effective_bits(self) -> float:
        """Bits of a full page over its elements, metadata and padding included."""
        return 8 * self.page_bytes / (PAGE_TOKENS * (self.key_dim + self.value_dim))

    def split(self, page: Tensor, name: str) -> Tensor:
        """One section of pages uint8 [..., page_bytes]."""
        start, end = self.offsets[name]
        return page[..., start:end]


def pack_quantised(layout: PageLayout, keys: KeyCodes, values: ValueCodes) -> Tensor:
    """Pages of quantised tokens.

    Args:
        layout: the page layout; ``N`` below is 64 times the number of pages.
        keys: codes [B, H, N, 2 P] in pair order, with their slots.
        values: codes [B, H, N, value_dim], with their scales and slots.

    Returns:
        uint8 [B, H, N / 64, page_bytes].
    """
    spec = layout.spec
    key = _paged(keys.codes).unflatten(-1, (2, -1))
    value = torch.nn.functional.pad(
        _paged(values.codes), (0, padded(layout.value_dim) - layout.value_dim)
    )
    scale_zero = torch.stack([values.scale, values.zero], -1)
    parts = [
        pack_words(key_to_fragments(key), spec.key_bits),
        *_pack_slots(keys.slot_index, keys.slot_residual),
        pack_words(value_to_fragments(value), spec.value_bits),
        _bytes(_paged(scale_zero)),
        *_pack_slots(values.slot_index, values.slot_residual),
    ]
    if keys.token_scale is not None:
        parts.insert(3, _bytes(_paged(keys.token_scale[..., None])))
    return torch.cat(parts, -1)


def unpack_keys(layout: PageLayout, pages: Tensor) -> KeyCodes:
    """Key codes [B, H, N, 2 P] in pair order of pages uint8 [B, H, N / 64, page_bytes]."""
    spec, dim = layout.spec, layout.key_dim
    words = layout.split(pages, "key_codes")
    nibbles = unpack_words(words, spec.key_bits, padded(dim) // 8)
    codes = key_from_fragments(nibbles).flatten(-2)
    index, residual = unpack_slots(layout, pages, "key")
    scale = None
    if spec.key_token_scale:
        scale = _view(layout.split(pages, "key_token_scale"), torch.float16).flatten(-2)
    return KeyCodes(codes.flatten(-3, -2), index, residual, scale)


def unpack_values(layout: PageLayout, pages: Tensor) -> ValueCodes:
    """Value codes [B, H, N, D] of pages uint8 [B, H, N / 64, page_bytes]."""
    spec, dim = layout.spec, layout.value_dim
    words = layout.split(pages, "value_codes")
    nibbles = unpack_words(words, spec.value_bits, padded(dim) // 8)
    codes = value_from_fragments(nibbles)[..., :dim]
    index, residual = unpack_slots(layout, pages, "value")
    scale_zero = _view(layout.split(pages, "value_scale_zero"), torch.float16)
    scale, zero = scale_zero.unflatten(-1, (PAGE_TOKENS, 2)).flatten(-3, -2).unbind(-1)
    return ValueCodes(codes.flatten(-3, -2), scale, zero, index, residual)


def pack_raw(keys: Tensor, values: Tensor) -> Tensor:
    """Lossless pages uint8 [B, H, N / 64, page_bytes] of keys [B, H, N, 2 P] and values."""
    return torch.cat([_bytes(_paged(keys)), _bytes(_paged(values))], -1)


def unpack_raw(layout: PageLayout, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, N, D] of lossless pages."""
    keys = _view(layout.split(pages, "keys"), dtype).unflatten(-1, (PAGE_TOKENS, -1))
    values = _view(layout.split(pages, "values"), dtype).unflatten(-1, (PAGE_TOKENS, -1))
    return keys.flatten(-3, -2), values.flatten(-3, -2)


def pair_order(pairs: Sequence[tuple[int, int]], dim: int) -> list[int]:
    """The model's channel at every place of pair order, -1 for padding; ``2 P`` entries.

    Args:
        pairs: channels that turn together, by falling frequency.
        dim: channels of the head; those in no pair form pairs of frequency zero.
    """
    turned = {channel for pair in pairs for channel in pair}
    rest = [channel for channel in range(dim) if channel not in turned]
    rest += [-1] * (padded(dim) - dim)
    half = len(rest) // 2
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    return [*first, *rest[:half], *second, *rest[half:]]


def _paged(x: Tensor) -> Tensor:
    """[..., N, D] -> [..., N / 64, 64, D]."""
    return x.unflatten(-2, (-1, PAGE_TOKENS))


def _bytes(x: Tensor) -> Tensor:
    """[..., 64, D] of any dtype -> uint8 [..., bytes]."""
    return x.flatten(-2).contiguous().view(torch.uint8)


def _view(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.contiguous().view(dtype)


def _pack_slots(index: Tensor, residual: Tensor) -> list[Tensor]:
    """[B, H, N, m] twice -> two byte sections [B, H, pages, ...] in [slot][token] order."""
    return [_bytes(_paged(x).transpose(-1, -2)) for x in (index, residual)]


def unpack_slots(layout: PageLayout, pages: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Slot channels and float16 residuals [B, H, N, m] of "key" or "value"."""
    keys = kind == "key"
    slots = layout.spec.key_slots if keys else layout.spec.value_slots
    wide = index_dtype(layout.key_dim if keys else layout.value_dim)
    out = []
    for name, dtype in (("index", wide), ("residual", torch.float16)):
        flat = _view(layout.split(pages, f"{kind}_slot_{name}"), dtype)
        out.append(flat.unflatten(-1, (slots, PAGE_TOKENS)).transpose(-1, -2).flatten(-3, -2))
    return out[0], out[1]


def lossless_spec() -> CodecSpec:
    """The format whose pages hold raw keys and values."""
    return CodecSpec(LOSSLESS, LOSSLESS, 0, 0, False, 0)
