"""Caches filled with random bytes and sensible scales, so that no prefill is needed, and random
constants for them, so that no calibration is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.fingerprint import fingerprint
from kvquant_compile.codec.feedback import STAGE_CHANNELS
from kvquant_compile.codec.layout import PageLayout, padded
from kvquant_compile.codec.spec import PAGE_TOKENS, CodecSpec, LayerTables
from kvquant_compile.runtime.cache import QuantizedCache
from tests.triton.cases import random_tables

CHUNK_PAGES = 4096


def fill_pages(slab: Tensor, layout: PageLayout, generator: torch.Generator) -> None:
    """Random codes, scales and outliers in place, a chunk of pages at a time.

    Args:
        slab: uint8 [pages, H, page_bytes] of quantised pages.
        layout: what the bytes mean.
        generator: on the slab's device.
    """
    for part in slab.split(CHUNK_PAGES):
        part.random_(0, 256, generator=generator)
        for name, x in _sections(part.shape[0], layout, generator).items():
            start, end = layout.offsets[name]
            part[..., start:end] = x.contiguous().view(torch.uint8).flatten(2)


def _sections(pages: int, layout: PageLayout, g: torch.Generator) -> dict[str, Tensor]:
    """What is not codes: float16 fields, and channels of outlier slots that exist."""
    lead, where = (pages, layout.heads), {"generator": g, "device": g.device}
    spec = layout.spec
    scale = torch.rand(*lead, PAGE_TOKENS, **where) * 0.02 + 0.002
    zero = torch.randn(*lead, PAGE_TOKENS, **where) * 0.3
    out = {"value_scale_zero": torch.stack([scale, zero], -1).half()}
    if spec.key_token_scale:
        out["key_token_scale"] = (torch.rand(*lead, PAGE_TOKENS, **where) + 0.5).half()
    channels = (("key", spec.key_slots, padded(layout.key_dim)),
                ("value", spec.value_slots, layout.value_dim))  # fmt: skip
    for kind, slots, dim in channels:
        if slots:
            first = torch.randint(0, dim, (*lead, 1, PAGE_TOKENS), **where)
            apart = torch.arange(slots, device=g.device)[:, None] * (dim // slots)
            index = torch.int16 if dim > 256 else torch.uint8
            out[f"{kind}_slot_index"] = ((first + apart) % dim).to(index)
            residual = torch.randn(*lead, slots, PAGE_TOKENS, **where)
            out[f"{kind}_slot_residual"] = residual.half()
    return out


def fill_exact(rows: Tensor, layout: PageLayout, tokens: int, generator: torch.Generator) -> None:
    """Random exact tokens in place, and a ring that holds the last of ``tokens`` tokens.

    Args:
        rows: [B, H, layout.exact_rows, layout.exact_width], float16 or bfloat16.
        layout: of the pages beside them.
        tokens: of every sequence.
        generator: on the device of ``rows``.
    """
    rows.normal_(generator=generator)
    if layout.ring:
        span = torch.tensor([max(0, tokens - layout.ring), tokens], dtype=torch.int32)
        state = span.to(rows.device).view(rows.dtype)
        rows[:, 0, -1, : len(state)] = state


def filled_cache(cache: QuantizedCache, batch: int, tokens: int, room: int, seed: int = 0) -> None:
    """Make an empty cache hold ``tokens`` random tokens of every sequence, with allocated
    room for ``room`` more. Takes no memory beside the cache but one chunk of pages.

    Tokens are begun and committed as a step would, only that pages are filled with random bytes.
    """
    columns = torch.arange(tokens + room, dtype=torch.int32, device=cache.device)
    cache.commit(cache.begin(columns.expand(batch, -1), None))
    cache.crop(-room)
    generator = torch.Generator(cache.device).manual_seed(seed)
    for layer in cache.pages:
        for slab in layer.slabs:
            fill_pages(slab, layer.layout, generator)
        fill_exact(layer.sinks, layer.layout, tokens, generator)


def tables_with_feedback(
    spec: CodecSpec, heads: int, dim: int, generator: torch.Generator
) -> LayerTables:
    """Random tables of a layer whose coding errors move later channels, as calibrated ones have
    them; ``generator`` is the CPU's."""
    return replace(
        random_tables(spec, heads, dim, dim, generator),
        key_feedback=_feedback(heads, padded(dim), generator),
        value_feedback=_feedback(heads, dim, generator),
    )


def _feedback(heads: int, dim: int, generator: torch.Generator) -> Tensor:
    matrix = torch.randint(-20, 21, (heads, dim, dim), generator=generator)
    stage = torch.arange(dim) // STAGE_CHANNELS
    return (matrix * (stage[:, None] < stage)).to(torch.int8)


def random_artifact(model: nn.Module, spec: CodecSpec, seed: int = 0) -> Artifact:
    """Tables that fit a transformers decoder's geometry and nothing else: for speed only."""
    config: Any = model.config
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    layers = range(config.num_hidden_layers)
    tables = {i: tables_with_feedback(spec, heads, dim, generator) for i in layers}
    return Artifact(
        dict.fromkeys(layers, spec),
        tables,
        fingerprint(model),
        dict.fromkeys(layers, (heads, dim, dim)),
        {"source": "random tables, for timing"},
    )
