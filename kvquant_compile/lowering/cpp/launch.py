"""``kvquant::attend`` through a compiled kernel: pointers in, one call, no torch inside it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.lowering.attend import CacheView, Site
from kvquant_compile.lowering.cpp.build import CompilationError, build
from kvquant_compile.lowering.cpp.constants import CppConstants, cpp_constants
from kvquant_compile.lowering.cpp.pool import parallel_address
from kvquant_compile.lowering.cpp.source import kernel_source
from kvquant_compile.lowering.cpp.spec import EXACT_TYPES, CppSpec, static_layout

_INTEGERS = ("batch", "heads", "rep", "steps", "value_dim", "sinks", "table_row", "position_row",
             "slabs", "window", "exact", "threads", "ring", "exact_type")  # fmt: skip
_STEP = ("query", "own_keys", "own_values", "sink_keys", "sink_values", "sink_logits",
         "exact_rows", "pair_channels", "slots", "history", "table", "positions", "slab",
         "slab_pages")  # fmt: skip
_LAYER = ("key_table", "key_zero", "key_ratio", "key_inverse", "key_scale", "value_table", "gain",
          "offset", "steps_of_pairs", "rope_scale", "offsets")  # fmt: skip
_POINTERS = (*_STEP, *_LAYER, "output", "lse", "parallel")


Kernel = Callable[[Any], None]


class Arguments(ctypes.Structure):
    """``struct Arguments`` of ``attend.h``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in _INTEGERS),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


def kernel_spec(layout: PageLayout, constants: CppConstants) -> CppSpec:
    """The kernel that a layer needs."""
    return CppSpec(static_layout(layout), constants.turning)


@functools.lru_cache(maxsize=256)
def kernel(spec: CppSpec, native: bool) -> Kernel | CompilationError:
    """The compiled function of a spec, or why there is none; tried once."""
    try:
        function = build(kernel_source(spec), spec.name, native).attend
    except CompilationError as error:
        return error
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    history: Tensor,
    cache: CacheView,
    site: Site,
    exact_chunk: bool,
    native: bool = True,
) -> tuple[Tensor, Tensor]:
    """As :func:`kvquant_compile.lowering.attend.attend`, for few tokens, without slopes or chunks.
    Where a format has exact last tokens, the step's are among them: ``exact_chunk`` must be true.

    Rotation angles are exact at any position; the torch path rounds them as the model does.

    Raises:
        CompilationError: the kernel cannot be compiled here.
    """
    layout = cache.layout
    constants = cpp_constants(layout, cache.tables, cache.geometry)
    run = kernel(kernel_spec(layout, constants), native)
    if isinstance(run, CompilationError):
        raise run
    batch, query_heads, steps, _ = query.shape
    rep = query_heads // layout.heads
    width = constants.pair_channels.numel()
    sinks, addresses = cache.sinks, [slab.data_ptr() for slab in cache.pages]
    leading = sinks[:, :, : layout.sink_tokens]
    own = (key, value) if exact_chunk else (key[:, :, :0], value[:, :, :0])
    held = {
        "query": _channels(query, constants.query_channels) * site.scale,
        "own_keys": _channels(own[0], constants.query_channels),
        "own_values": own[1].float().contiguous(),
        "sink_keys": leading[..., :width][..., constants.pair_channels].float().contiguous(),
        "sink_values": leading[..., width:].float().contiguous(),
        "exact_rows": sinks.contiguous(),
        "pair_channels": constants.pair_channels,
        "slots": slots.int().contiguous(),
        "history": history.contiguous(),
        "table": cache.table.contiguous(),
        "positions": cache.positions.contiguous(),
        "slab": torch.tensor(addresses, dtype=torch.int64),
        "slab_pages": torch.tensor([slab.shape[0] for slab in cache.pages], dtype=torch.int64),
        "output": torch.empty(batch, steps, query_heads, layout.value_dim),
        "lse": torch.empty(batch, query_heads, steps),
    }
    if site.sink_logits is not None:
        held["sink_logits"] = site.sink_logits.float().contiguous()
    arguments = Arguments(
        batch, layout.heads, rep, steps, layout.value_dim, layout.sink_tokens, cache.table.shape[1],
        cache.positions.shape[1], len(cache.pages), site.window, int(exact_chunk),
        torch.get_num_threads(), layout.ring, EXACT_TYPES.get(sinks.dtype, 0), site.softcap,
        **{name: x.data_ptr() for name, x in held.items()},
        **_layer_pointers(constants),
        parallel=parallel_address(),
    )  # fmt: skip
    run(ctypes.byref(arguments))
    return held["output"].to(query.dtype), held["lse"]


def _channels(x: Tensor, order: Tensor) -> Tensor:
    """Channels in ``order``, where one behind the last is zero; float32, contiguous."""
    if order.numel() > x.shape[-1]:
        x = torch.nn.functional.pad(x, (0, 1))
    return x[..., order].float().contiguous()


def _layer_pointers(constants: CppConstants) -> dict[str, int]:
    tensors = {"steps_of_pairs": constants.steps}
    tensors |= {name: getattr(constants, name) for name in _LAYER if name != "steps_of_pairs"}
    return {name: x.data_ptr() for name, x in tensors.items()}
