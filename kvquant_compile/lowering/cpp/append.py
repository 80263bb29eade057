"""``kvquant::append`` of a few tokens through a compiled kernel; the same bytes as torch gives."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.codec.keys import channel_importance
from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.order import reorder
from kvquant_compile.codec.spec import LayerTables
from kvquant_compile.lowering.cpp.build import CompilationError, build
from kvquant_compile.lowering.cpp.constants import repeated
from kvquant_compile.lowering.cpp.pool import parallel_address
from kvquant_compile.lowering.cpp.source import append_source
from kvquant_compile.lowering.cpp.spec import EXACT_TYPES, format_name, static_layout
from kvquant_compile.lowering.recent import keep_exact
from kvquant_compile.lowering.remembered import Remembered

_INTEGERS = ("batch", "heads", "steps", "value_dim", "table_row", "slabs", "threads", "sinks",
             "ring", "exact_type")  # fmt: skip
_STEP = ("keys", "values", "slots", "table", "slab", "slab_pages", "exact_rows")
_LAYER = ("key_levels", "key_scale", "key_zero", "key_weight", "key_share", "key_norm",
          "key_stretch", "key_feedback", "value_levels", "gain", "offset",
          "value_feedback")  # fmt: skip


class Arguments(ctypes.Structure):
    """``struct Arguments`` of ``append.h``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in _INTEGERS),
        *((name, ctypes.c_void_p) for name in (*_STEP, *_LAYER, "parallel")),
    )


@dataclass(frozen=True, eq=False)
class AppendConstants:
    """What encoding a layer's tokens takes, by the names of ``append.h``; empty where absent."""

    tensors: dict[str, Tensor]


_CONSTANTS: Remembered[AppendConstants] = Remembered()


def _constants(layout: PageLayout, tables: list[Tensor]) -> AppendConstants:
    known, heads = LayerTables(*tables), layout.heads
    made = {
        "key_levels": repeated(known.key_table),
        "key_scale": known.key_scale,
        "key_zero": known.key_zero,
        "key_weight": known.key_weight,
        "key_share": channel_importance(known),
        "key_norm": known.key_norm.expand(heads),
        "key_stretch": known.key_stretch.expand(heads),
        "value_levels": repeated(known.value_table),
        "gain": known.value_gain,
        "offset": known.value_offset,
    }
    feedback = {"key_feedback": known.key_feedback, "value_feedback": known.value_feedback}
    tensors = {name: x.float().contiguous() for name, x in made.items()}
    tensors |= {name: x.contiguous() for name, x in feedback.items() if x.numel()}
    return AppendConstants(tensors)


@functools.lru_cache(maxsize=256)
def kernel(layout: PageLayout, native: bool) -> Callable[[Any], None] | CompilationError:
    """The compiled function of a format, or why there is none; tried once."""
    source, name = append_source(layout), f"append_{format_name(layout)}"
    try:
        function = build(source, name, native, contract=False).append
    except CompilationError as error:
        return error
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function


def append(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    table: Tensor,
    pages: list[Tensor],
    sinks: Tensor,
    tables: list[Tensor],
    geometry: list[Tensor],
    format: str,
    native: bool = True,
) -> None:
    """As :func:`kvquant_compile.lowering.append.append`, token by token.

    Raises:
        CompilationError: the kernel cannot be compiled here.
    """
    layout = PageLayout.parse(format)
    run = kernel(static_layout(layout), native)
    if isinstance(run, CompilationError):
        raise run
    constants = _CONSTANTS.get(tables, lambda: _constants(layout, tables))
    ordered = reorder(key, geometry[0])
    batch, heads, steps, _ = key.shape
    held = {
        "keys": ordered.float().contiguous(),
        "values": value.float().contiguous(),
        "slots": slots.int().contiguous(),
        "table": table.contiguous(),
        "slab": torch.tensor([slab.data_ptr() for slab in pages], dtype=torch.int64),
        "slab_pages": torch.tensor([slab.shape[0] for slab in pages], dtype=torch.int64),
    }
    ours = layout.ring > 0 and sinks.is_contiguous() and key.dtype == sinks.dtype
    if ours:
        held["exact_rows"] = sinks
    arguments = Arguments(
        batch, heads, steps, layout.value_dim, table.shape[1], len(pages),
        torch.get_num_threads(), layout.sink_tokens, layout.ring, EXACT_TYPES.get(sinks.dtype, 0),
        **{name: x.data_ptr() for name, x in (held | constants.tensors).items()},
        parallel=parallel_address(),
    )  # fmt: skip
    run(ctypes.byref(arguments))
    if not ours and (layout.ring or int(slots.min()) < layout.sink_tokens):
        tokens = torch.cat([ordered, value.to(key.dtype)], -1)
        keep_exact(sinks, tokens, slots, layout.sink_tokens, layout.ring)
