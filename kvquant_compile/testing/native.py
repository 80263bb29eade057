"""``kvquant+`` formats for the assertions: the keys' and the values' part of packed pages."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvquant_compile.calib.fit import fit_layer
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec.keys import dequantise_keys, quantise_keys
from kvquant_compile.codec.layout import PageLayout, pack_quantised, unpack_keys, unpack_values
from kvquant_compile.codec.spec import PAGE_TOKENS, CodecSpec
from kvquant_compile.codec.values import dequantise_values, quantise_values

Half = tuple[
    str,
    Callable[[Tensor], Tensor],
    Callable[[Tensor], Tensor],
    int,
    Callable[[Tensor], None],
    Callable[[int], float],
]


def native_halves(spec: CodecSpec, calibration: Tensor) -> list[Half]:
    """(name, encode, decode, tokens, no bound, declared bits) of keys and of values.

    Tables are fitted to ``calibration`` [B, H, N, D], D a multiple of 16. Whole pages are coded.
    """
    heads, dim = calibration.shape[1], calibration.shape[-1]
    flat = calibration.float().transpose(0, 1).flatten(1, 2)
    tables = fit_layer(flat, flat, None, None, spec, FitSettings(sensitivity=False))
    layout = PageLayout(spec, heads, dim, dim, 4)
    middle = layout.offsets["value_codes"][0]

    def pages(x: Tensor) -> Tensor:
        return pack_quantised(
            layout, quantise_keys(x, tables, spec), quantise_values(x, tables, spec)
        )

    def whole(part: Tensor, start: int) -> Tensor:
        page = part.new_zeros(*part.shape[:-1], layout.page_bytes)
        page[..., start : start + part.shape[-1]] = part
        return page

    def keys(code: Tensor) -> Tensor:
        return dequantise_keys(unpack_keys(layout, whole(code, 0)), tables, spec)

    def values(code: Tensor) -> Tensor:
        return dequantise_values(unpack_values(layout, whole(code, middle)), tables, spec)

    sizes = (middle, layout.page_bytes - middle)
    kinds = (
        ("keys", lambda x: pages(x)[..., :middle], keys),
        ("values", lambda x: pages(x)[..., middle:], values),
    )
    return [
        (
            f"kvquant+ {kind}",
            encode,
            decode,
            PAGE_TOKENS,
            _no_bound,
            _constant(8 * size / (PAGE_TOKENS * dim)),
        )
        for (kind, encode, decode), size in zip(kinds, sizes, strict=True)
    ]


def _no_bound(x: Tensor) -> None:
    return None


def _constant(bits: float) -> Callable[[int], float]:
    return lambda dim: bits
