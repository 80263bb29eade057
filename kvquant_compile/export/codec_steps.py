"""The codec as functions of an exported graph: quantise, pack, unpack, dequantise.

Every body calls the codec itself, so that a file holds the very arithmetic of
:mod:`kvquant_compile.codec`. Tokens and pages of all sequences lie on one axis here, and
residuals and scales are float32 with float16 values, because few runtimes compute in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.codec.keys import KeyCodes, dequantise_keys, quantise_keys
from kvquant_compile.codec.layout import (
    PageLayout,
    pack_quantised,
    padded,
    unpack_keys,
    unpack_values,
)
from kvquant_compile.codec.slots import index_dtype
from kvquant_compile.codec.spec import PAGE_TOKENS, LayerTables
from kvquant_compile.codec.values import ValueCodes, dequantise_values, quantise_values
from kvquant_compile.export.signature import Argument, Signature, Size, tensors_like

_U8, _I32, _F32 = torch.uint8, torch.int32, torch.float32
Outputs = tuple[Tensor, ...]
Body = Callable[["Emit", Sequence[Tensor]], Outputs]
KEY_READ = ("key_table", "key_scale", "key_zero")
VALUE_READ = ("value_table", "value_gain", "value_offset")


@dataclass(frozen=True)
class Function:
    """A function of the exported graph.

    Attributes:
        name: within our domain.
        variant: tells functions of one name and different signature or body apart.
        about: one sentence for people who look at the file.
        signature: of its tensors.
        body: what it computes; calls other functions through its first argument.
        settings: values of the inputs that are attributes of a node rather than tensors.
    """

    name: str
    variant: str
    about: str
    signature: Signature
    body: Body
    settings: tuple[tuple[str, float | int], ...] = ()


Emit = Callable[[Function, Sequence[Tensor]], Outputs]


def run(function: Function, inputs: Sequence[Tensor]) -> Outputs:
    """Compute a function at once, its inner ones too."""
    settings = [torch.tensor(value) for _, value in function.settings]
    return function.body(run, [*inputs, *settings])


def quantiser(layout: PageLayout, kind: str, tables: dict[str, Tensor]) -> Function:
    """``quantise_keys`` or ``quantise_values``: tokens [1, H, tokens, D] to their codes.

    Args:
        layout: of the pages.
        kind: "key" or "value".
        tables: the constants it uses, by name.
    """
    keys = kind == "key"
    names, spec = tuple(tables), layout.spec

    def body(emit: Emit, given: Sequence[Tensor]) -> Outputs:
        x, known = given[0], _tables(names, given[1:])
        return _fields(quantise_keys(x, known, spec) if keys else quantise_values(x, known, spec))

    width = padded(layout.key_dim) if keys else layout.value_dim
    tokens = Argument(f"{kind}s", _F32, (1, layout.heads, "tokens", width))
    return Function(
        f"quantise_{kind}s",
        str(layout),
        f"Codes, outlier slots and scales of {kind}s.",
        Signature((tokens, *tensors_like(tables)), code_fields(layout, kind, ("tokens",))),
        body,
    )


def packer(layout: PageLayout) -> Function:
    """``pack``: codes of tokens [1, H, pages, 64, ...] to the bytes of pages."""
    fields = _all_fields(layout)

    def body(emit: Emit, given: Sequence[Tensor]) -> Outputs:
        named = {f.name: x.flatten(2, 3) for f, x in zip(fields, given, strict=True)}
        return (pack_quantised(layout, _key_codes(layout, named), _value_codes(layout, named)),)

    pages = (_pages(layout),)
    return Function("pack", str(layout), "Bytes of pages.", Signature(tuple(fields), pages), body)


def unpacker(layout: PageLayout, kind: str) -> Function:
    """``unpack_keys`` or ``unpack_values``: the inverse of ``pack``."""

    def body(emit: Emit, given: Sequence[Tensor]) -> Outputs:
        read = unpack_keys if kind == "key" else unpack_values
        return tuple(x.unflatten(2, (-1, PAGE_TOKENS)) for x in _fields(read(layout, given[0])))

    outputs = code_fields(layout, kind, ("pages", PAGE_TOKENS))
    return Function(
        f"unpack_{kind}s",
        str(layout),
        f"Codes of {kind}s from the bytes of pages.",
        Signature((_pages(layout),), outputs),
        body,
    )


def dequantiser(layout: PageLayout, kind: str, tables: dict[str, Tensor]) -> Function:
    """``dequantise_keys`` or ``dequantise_values``: codes [1, H, tokens, ...] to float32."""
    keys = kind == "key"
    names, fields = tuple(tables), code_fields(layout, kind, ("tokens",))

    def body(emit: Emit, given: Sequence[Tensor]) -> Outputs:
        named = {f.name: x for f, x in zip(fields, given[: len(fields)], strict=True)}
        known = _tables(names, given[len(fields) :])
        if keys:
            return (dequantise_keys(_key_codes(layout, named), known, layout.spec),)
        return (dequantise_values(_value_codes(layout, named), known, layout.spec),)

    width = padded(layout.key_dim) if keys else layout.value_dim
    output = Argument(f"{kind}s", _F32, (1, layout.heads, "tokens", width))
    return Function(
        f"dequantise_{kind}s",
        str(layout),
        f"{kind.capitalize()}s from their codes, tables, scales and outlier slots.",
        Signature((*fields, *tensors_like(tables)), (output,)),
        body,
    )


def code_fields(layout: PageLayout, kind: str, tokens: tuple[Size, ...]) -> tuple[Argument, ...]:
    """What is known of the quantised keys or values of tokens."""
    spec, lead = layout.spec, (1, layout.heads, *tokens)
    if kind == "key":
        dim, slots = padded(layout.key_dim), spec.key_slots
        scales: tuple[str, ...] = ("token_scale",) if spec.key_token_scale else ()
    else:
        dim, slots, scales = layout.value_dim, spec.value_slots, ("scale", "zero")
    return (
        Argument(f"{kind}_codes", _U8, (*lead, dim)),
        Argument(f"{kind}_slot_index", _I32, (*lead, slots)),
        Argument(f"{kind}_slot_residual", _F32, (*lead, slots)),
        *(Argument(f"{kind}_{name}", _F32, lead) for name in scales),
    )


def _all_fields(layout: PageLayout) -> tuple[Argument, ...]:
    tokens = ("pages", PAGE_TOKENS)
    return (*code_fields(layout, "key", tokens), *code_fields(layout, "value", tokens))


def _pages(layout: PageLayout) -> Argument:
    return Argument("pages", _U8, (1, layout.heads, "pages", layout.page_bytes))


def _fields(codes: KeyCodes | ValueCodes) -> Outputs:
    """In the order of :func:`code_fields`."""
    common = (codes.codes, codes.slot_index.to(_I32), codes.slot_residual.float())
    if isinstance(codes, ValueCodes):
        return (*common, codes.scale.float(), codes.zero.float())
    return common if codes.token_scale is None else (*common, codes.token_scale.float())


def _key_codes(layout: PageLayout, named: dict[str, Tensor]) -> KeyCodes:
    scale = named.get("key_token_scale")
    common = _common(named, "key", layout.key_dim)
    return KeyCodes(*common, None if scale is None else scale.half())


def _value_codes(layout: PageLayout, named: dict[str, Tensor]) -> ValueCodes:
    codes, index, residual = _common(named, "value", layout.value_dim)
    scale, zero = named["value_scale"].half(), named["value_zero"].half()
    return ValueCodes(codes, scale, zero, index, residual)


def _common(named: dict[str, Tensor], kind: str, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    index = named[f"{kind}_slot_index"].to(index_dtype(dim))
    return named[f"{kind}_codes"], index, named[f"{kind}_slot_residual"].half()


def _tables(names: Sequence[str], given: Sequence[Tensor]) -> LayerTables:
    """Constants, of which only the named ones will be asked for."""
    none = torch.empty(0)
    return LayerTables(
        **dict.fromkeys(LayerTables.__dataclass_fields__, none)
        | dict(zip(names, given, strict=True))
    )
