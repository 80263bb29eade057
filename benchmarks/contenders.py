"""The contenders of the decode table: each a maker of calls on rotated inputs.

A maker allocates one buffer for all its inputs and returns a call for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import FORMATS, Format, Size
from benchmarks.measure import Call
from benchmarks.synthetic import fill_exact, fill_pages
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering import ops
from kvquant_compile.lowering.constants import lower_layer
from tests.triton.cases import random_tables


@dataclass
class Contender:
    """Calls on different inputs, and the bytes of cache that one call reads.

    Attributes:
        calls: one for each input set.
        cache_bytes: of one set.
        variants: the same calls in other settings; the fastest setting counts.
    """

    calls: list[Call]
    cache_bytes: int
    variants: dict[str, list[Call]] = field(default_factory=dict)

    def settings(self) -> dict[str, list[Call]]:
        """The calls of every setting by its name; one without a name where there are no more."""
        return self.variants or {"": self.calls}


Maker = Callable[[Size, torch.device], Contender]


def makers() -> dict[str, Maker]:
    """Every contender by name, the peers first."""
    from benchmarks.fp8_baseline import fp8

    peers: dict[str, Maker] = {
        "cudnn fp16": partial(sdpa, torch.float16, SDPBackend.CUDNN_ATTENTION),
        "cudnn bf16": partial(sdpa, torch.bfloat16, SDPBackend.CUDNN_ATTENTION),
        "flash bf16": partial(sdpa, torch.bfloat16, SDPBackend.FLASH_ATTENTION),
        "flex bf16": flex,
        "fp8": fp8,
    }
    return peers | {form.name: partial(ours, form) for form in FORMATS}


def ours(form: Format, size: Size, device: torch.device) -> Contender:
    """``kvquant::attend`` on random pages, as a decode step calls it: lengths, positions and
    block tables on the device, exact tokens and the step's own token included."""
    dtype = torch.float16
    g = torch.Generator(device).manual_seed(1)
    tables = random_tables(
        form.spec, size.kv_heads, size.dim, size.dim, torch.Generator().manual_seed(0)
    )
    constants = lower_layer(form.plan(size), form.spec, tables, dtype, device)
    layout = constants.layout
    columns = -(-(size.tokens + 1) // PAGE_TOKENS)
    used = size.batch * -(-size.tokens // PAGE_TOKENS) * size.kv_heads * layout.page_bytes
    sets = size.sets(used)
    pages = torch.empty(
        sets * size.batch * columns, size.kv_heads, layout.page_bytes,
        dtype=torch.uint8, device=device,
    )  # fmt: skip
    fill_pages(pages, layout, g)
    every = torch.arange(len(pages), device=device, dtype=torch.int32)
    block_tables = every.view(sets, size.batch, columns)
    where: dict[str, Any] = {"device": device, "dtype": torch.int32}
    positions = torch.arange(columns * PAGE_TOKENS, **where).repeat(size.batch, 1)
    slots = torch.full((size.batch, 1), size.tokens, **where)
    history = slots[:, 0].contiguous()
    shape = (size.batch, size.kv_heads, layout.exact_rows, layout.exact_width)
    sinks = torch.empty(shape, device=device, dtype=dtype)
    fill_exact(sinks, layout, size.tokens + 1, g)
    q, k, v = (
        torch.randn(size.batch, heads, 1, size.dim, device=device, dtype=dtype, generator=g)
        for heads in (size.query_heads, size.kv_heads, size.kv_heads)
    )
    arguments, geometry = constants.arguments()
    scale = form.plan(size).attends[0].scale

    def call(table: Tensor) -> Any:
        return ops.attend(
            q, k, v, slots, history, table, positions, [pages], sinks, arguments, geometry,
            None, scale, 0.0, 0, True, str(layout),
        )  # fmt: skip

    return Contender([partial(call, table) for table in block_tables], used)


def dense(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, Hq, 1, D], and keys and values [sets, B, H, N, D]."""
    sets = size.sets(size.dense_bytes(dtype.itemsize))
    shape = (sets, size.batch, size.kv_heads, size.tokens, size.dim)
    k, v = (torch.empty(shape, dtype=dtype, device=device).normal_() for _ in "kv")
    return torch.randn(
        size.batch, size.query_heads, 1, size.dim, dtype=dtype, device=device
    ), k, v  # fmt: skip


def sdpa(dtype: torch.dtype, backend: SDPBackend, size: Size, device: torch.device) -> Contender:
    """torch's attention on a 16-bit cache."""
    q, keys, values = dense(size, dtype, device)
    grouped = size.query_heads != size.kv_heads

    def call(k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    calls: list[Call] = [partial(call, k, v) for k, v in zip(keys, values, strict=True)]
    return Contender(calls, size.dense_bytes(2))


def flex(size: Size, device: torch.device) -> Contender:
    """Compiled FlexAttention on a bfloat16 cache, in its flash-decoding kernel.

    The block mask is real, although nothing is masked: without one, FlexAttention counts the
    cache as part of a single block of 2**30 keys, gives every split an equal share of *that*, and
    the first split reads the whole cache alone.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # each size is compiled on its own, so none becomes dynamic
    q, keys, values = dense(size, torch.bfloat16, device)
    mask = _all_blocks(size.tokens, device)
    programs = size.batch * size.kv_heads
    compute = torch.cuda.get_device_properties(device).multi_processor_count
    settings: dict[str, dict[str, Any]] = {
        "its own": {},
        "4 warps, 3 stages": {
            "BLOCK_N": 64, "num_warps": 4, "num_stages": 3,
            "SPLIT_KV": max(1, min(4 * compute // programs, size.tokens // 128)),
        },
    }  # fmt: skip

    grouped = size.query_heads != size.kv_heads

    def maker(options: dict[str, Any]) -> list[Call]:
        def attend(k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(
                q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=options
            )

        compiled = torch.compile(attend, dynamic=False)
        return [partial(compiled, k, v) for k, v in zip(keys, values, strict=True)]

    variants = {name: maker(options) for name, options in settings.items()}
    return Contender([], size.dense_bytes(2), variants)


def _all_blocks(tokens: int, device: torch.device, block: int = 128) -> Any:
    """A block mask of one query that leaves no key out."""
    from torch.nn.attention.flex_attention import BlockMask, noop_mask

    count = -(-tokens // block)
    index = torch.arange(count, dtype=torch.int32, device=device).view(1, 1, 1, -1)
    whole, none = (torch.full((1, 1, 1), n, dtype=torch.int32, device=device) for n in (count, 0))
    return BlockMask.from_kv_blocks(
        none, index, whole, index, BLOCK_SIZE=block, mask_mod=noop_mask, seq_lengths=(1, tokens)
    )
