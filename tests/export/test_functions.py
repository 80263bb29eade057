"""The functions of exported graphs, run in torch, against the two ops: bytes and attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.export.attend_step import Attention, attender
from kvquant_compile.export.cache_steps import LayerStore, appender
from kvquant_compile.export.codec_steps import Function, run
from kvquant_compile.lowering import ops

BATCH, CAPACITY, HEADS, GROUP = 2, 4, 2, 2
STEPS = (70, 1, 1, 5, 64, 1)


@dataclass
class Case:
    """A layer with random constants, and the cache of both ways of running it."""

    store: LayerStore
    tables: list[Tensor]
    geometry: list[Tensor]
    pages: Tensor
    sinks: Tensor


def case(spec: CodecSpec, key_dim: int = 16, value_dim: int = 16, rope: bool = True) -> Case:
    layout = PageLayout(spec, HEADS, key_dim, value_dim, 4)
    width, pairs = layout.exact_width - value_dim, (layout.exact_width - value_dim) // 2
    order = torch.randperm(key_dim).tolist() + [key_dim] * (width - key_dim)
    tables = {
        "key_table": _levels(spec.key_bits),
        "key_scale": torch.rand(HEADS, width) / 40 + 0.01,
        "key_zero": torch.randint(-9, 9, (HEADS, width)).float(),
        "key_weight": torch.rand(HEADS, width) + 0.1,
        "value_table": _levels(spec.value_bits),
        "value_gain": torch.rand(HEADS, value_dim) + 0.5,
        "value_offset": torch.randn(HEADS, value_dim),
        "key_norm": torch.rand(HEADS) + 40,
        "key_stretch": torch.ones(()),
        "key_feedback": torch.randint(-9, 9, (HEADS, width, width)).triu(16).to(torch.int8),
        "value_feedback": torch.empty(0, dtype=torch.int8),
    }
    geometry = {
        "key_order": torch.tensor(order),
        "query_order": torch.tensor(order),
        "frequencies": torch.rand(pairs) if rope else torch.empty(0),
        "rope_scale": torch.ones(pairs) if rope else torch.empty(0),
    }
    known = [{n: x for n, x in part.items() if x.numel()} for part in (tables, geometry)]
    store = LayerStore(layout, *known, torch.float32)
    pages = torch.zeros(BATCH, CAPACITY, HEADS, layout.page_bytes, dtype=torch.uint8)
    sinks = torch.zeros(BATCH, HEADS, layout.exact_rows, layout.exact_width)
    return Case(store, [*tables.values()], [*geometry.values()], pages, sinks)


def _levels(bits: int) -> Tensor:
    return torch.stack(
        [torch.randperm(255)[: 2**bits].sort().values - 127 for _ in range(HEADS)]
    ).to(torch.int8)


def call(function: Function, tensors: list[Tensor], store: LayerStore, extras: Any) -> Any:
    constants = store.tables | store.geometry | extras
    names = [x.name for x in function.signature.inputs[len(tensors) :]]
    return run(function, [*tensors, *(constants[name] for name in names)])


def check(layer: Case, site: Attention) -> None:
    """Several steps, the second row with leading padding: bytes equal, attention close."""
    store, layout = layer.store, layer.store.layout
    append, attend = appender(store), attender(store, site)
    pages, sinks = layer.pages.clone(), layer.sinks.clone()
    table = torch.arange(BATCH * CAPACITY, dtype=torch.int32).view(BATCH, CAPACITY)
    places = torch.arange(64 * CAPACITY, dtype=torch.int32).expand(BATCH, -1).contiguous()
    lengths, heads = torch.zeros(BATCH, dtype=torch.int64), HEADS * GROUP
    for steps in STEPS:
        real = torch.ones(BATCH, steps, dtype=torch.bool)
        real[1, : steps // 3] = False
        slots = torch.where(real, lengths[:, None] + real.long().cumsum(1) - 1, -1)
        key = torch.randn(BATCH, HEADS, steps, layout.key_dim)
        value = torch.randn(BATCH, HEADS, steps, layout.value_dim)
        turned, query = torch.randn_like(key), torch.randn(BATCH, heads, steps, layout.key_dim)
        flat, constants = [layer.pages.flatten(0, 1)], (layer.tables, layer.geometry)
        ops.append(key, value, slots.int(), table, flat, layer.sinks, *constants, str(layout))
        pages, sinks = call(append, [key, value, slots, pages, sinks], store, {})
        assert torch.equal(pages, layer.pages)
        assert torch.equal(sinks, layer.sinks)
        expected, _ = ops.attend(
            query, turned, value, slots.int(), lengths.int(), table, places, flat, layer.sinks,
            *constants, site.extras.get("sink_logits"), site.scale, site.softcap, site.window,
            site.exact_chunk, str(layout), site.extras.get("slopes"), site.chunk,
        )  # fmt: skip
        tensors = [query, turned, value, slots, lengths, pages, sinks]
        (output,) = call(attend, tensors, store, site.extras)
        rows = real[:, :, None, None]  # what padding is given, nobody reads
        torch.testing.assert_close(output * rows, expected * rows, rtol=1e-5, atol=1e-5)
        lengths = lengths + real.sum(1)


PLAIN = Attention(HEADS * GROUP, 0.25, 0.0, 0, 0, True)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_widths(bits: int) -> None:
    torch.manual_seed(bits)
    check(case(CodecSpec(bits, 9 - bits if bits > 4 else bits, 1, 1, True, 1)), PLAIN)


@pytest.mark.parametrize(
    ("spec", "dims"),
    [
        (CodecSpec(3, 3, 0, 0, False, 0), (16, 16)),
        (CodecSpec(3, 2, 2, 3, True, 4), (40, 24)),
        (CodecSpec(4, 4, 1, 1, True, 1), (8, 48)),
        (CodecSpec(3, 3, 1, 1, True, 1), (272, 264)),
    ],
)
def test_slots_sinks_and_head_sizes(spec: CodecSpec, dims: tuple[int, int]) -> None:
    torch.manual_seed(0)
    check(case(spec, *dims), PLAIN)


@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 3.0},
        {"window": 20},
        {"chunk": 24},
        {"exact_chunk": False},
        {"exact_chunk": False, "window": 7, "softcap": 2.0},
        {"extras": {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}},
        {"extras": {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.02])}},
    ],
    ids=str,
)
def test_what_attention_does_to_scores(change: dict[str, Any]) -> None:
    torch.manual_seed(1)
    check(case(CodecSpec(3, 3, 1, 1, True, 1)), replace(PLAIN, **change))


def test_without_rotation() -> None:
    torch.manual_seed(2)
    check(case(CodecSpec(3, 3), rope=False), PLAIN)
