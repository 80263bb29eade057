"""pytest-benchmark: the codec and the torch path on a CPU. Run with ``make bench``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import FORMATS, Format
from kvquant_compile.codec.keys import dequantise_keys, quantise_keys
from kvquant_compile.codec.layout import PageLayout, pack_quantised, unpack_keys, unpack_values
from kvquant_compile.codec.spec import LayerTables
from kvquant_compile.codec.values import dequantise_values, quantise_values
from kvquant_compile.lowering.attend import attend
from tests.lowering.reference import half_rope
from tests.triton.cases import Case, random_tables

HEADS, DIM, TOKENS = 2, 128, 1024
FORMS = pytest.mark.parametrize("form", FORMATS[:5], ids=lambda f: f.name)


@pytest.fixture
def tables(form: Format) -> LayerTables:
    return random_tables(form.spec, HEADS, DIM, DIM, torch.Generator().manual_seed(0))


@pytest.fixture
def layout(form: Format) -> PageLayout:
    return PageLayout(form.spec, HEADS, DIM, DIM, 2)


def tokens(benchmark: Any, count: int = TOKENS) -> None:
    """Note the work of one call, so that a rate can be read off the JSON."""
    benchmark.extra_info.update(tokens=count, heads=HEADS, dim=DIM)


def vectors() -> torch.Tensor:
    return torch.randn(1, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(1))


@FORMS
def test_quantise_keys(benchmark: Any, form: Format, tables: LayerTables) -> None:
    tokens(benchmark)
    codes = benchmark(quantise_keys, vectors(), tables, form.spec)
    assert codes.codes.shape[2] == TOKENS


@FORMS
def test_quantise_values(benchmark: Any, form: Format, tables: LayerTables) -> None:
    tokens(benchmark)
    codes = benchmark(quantise_values, vectors(), tables, form.spec)
    assert codes.codes.shape[2] == TOKENS


@FORMS
def test_pack(benchmark: Any, form: Format, tables: LayerTables, layout: PageLayout) -> None:
    tokens(benchmark)
    keys = quantise_keys(vectors(), tables, form.spec)
    values = quantise_values(vectors(), tables, form.spec)
    pages = benchmark(pack_quantised, layout, keys, values)
    assert pages.shape[-1] == layout.page_bytes


@FORMS
def test_unpack_and_dequantise(
    benchmark: Any, form: Format, tables: LayerTables, layout: PageLayout
) -> None:
    tokens(benchmark)
    keys = quantise_keys(vectors(), tables, form.spec)
    values = quantise_values(vectors(), tables, form.spec)
    pages = pack_quantised(layout, keys, values)

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            dequantise_keys(unpack_keys(layout, pages), tables, form.spec),
            dequantise_values(unpack_values(layout, pages), tables, form.spec),
        )

    k, v = benchmark(read)
    assert torch.equal(k, dequantise_keys(keys, tables, form.spec))
    assert torch.equal(v, dequantise_values(values, tables, form.spec))


@FORMS
def test_attend(benchmark: Any, form: Format) -> None:
    tokens(benchmark)
    case = Case(form.spec, (DIM, DIM), half_rope(DIM, DIM), HEADS, 4, (TOKENS,), slabs=1)
    output, _ = benchmark(attend, *case.build().arguments())
    assert output.isfinite().all()
