"""Which device runs the Gluon kernel, which kernel a site gets, and how work is shared."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvquant_compile.codec.layout import PageLayout
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.attend import Site
from kvquant_compile.lowering.gluon import launch
from kvquant_compile.lowering.gluon.constants import gluon_constants
from kvquant_compile.lowering.gluon.memory import Memory
from kvquant_compile.lowering.gluon.spec import GluonSpec
from kvquant_compile.lowering.source import kernels_source
from kvquant_compile.lowering.triton import dispatch
from tests.gluon.test_interpreted import HALF_SERIES, NARROW, SMALL

CUDA = torch.device("cuda")
LAYOUT = HALF_SERIES.build().layout
H200 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10)
RTX4090 = SimpleNamespace(multi_processor_count=128, shared_memory_per_multiprocessor=100 << 10)


@pytest.fixture
def gluon_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H200)


@pytest.mark.usefixtures("gluon_device")
def test_a_gpu_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.applies(LAYOUT, CUDA)
    assert not launch.applies(LAYOUT, torch.device("cpu"))
    assert not launch.applies(replace(LAYOUT, key_dim=80), CUDA)
    assert dispatch.use_gluon(LAYOUT, CUDA)
    monkeypatch.setenv(dispatch.SWITCH, "portable")
    assert not dispatch.use_gluon(LAYOUT, CUDA)


@pytest.mark.usefixtures("gluon_device")
@pytest.mark.parametrize(
    ("capability", "runs", "bulk"),
    [((7, 5), False, False), ((8, 0), True, False), ((8, 9), True, False), ((12, 0), True, True)],
)
def test_other_architectures(
    capability: tuple[int, int], runs: bool, bulk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: RTX4090)
    assert launch.applies(LAYOUT, CUDA) == runs
    assert launch.bulk_copies(CUDA) == bulk


@pytest.mark.usefixtures("gluon_device")
def test_a_program_has_to_fit_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = PageLayout(CodecSpec(3, 3, 1, 1, True, 1), 8, 256, 256, 2)
    assert launch.applies(wide, CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: RTX4090)
    assert not launch.applies(wide, CUDA)
    assert launch.applies(replace(wide, key_dim=128, value_dim=128), CUDA)


@pytest.mark.usefixtures("gluon_device")
def test_older_kernels_on_a_newer_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.bulk_copies(CUDA)
    monkeypatch.setenv(dispatch.SWITCH, "ampere")
    assert dispatch.use_gluon(LAYOUT, CUDA)
    assert not launch.bulk_copies(CUDA)


@pytest.mark.usefixtures("gluon_device")
def test_neither_do_other_vendors_nor_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not launch.applies(LAYOUT, CUDA)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    assert not launch.applies(LAYOUT, CUDA)


def spec_of(name: str, columns: int) -> GluonSpec:
    built = SMALL[name].build()
    constants = gluon_constants(built.layout, built.cache.tables, built.cache.geometry, columns)
    return launch.gluon_spec(built.layout, constants, built.site, columns, bulk=True)


def test_a_site_gets_its_kernel() -> None:
    plain = spec_of("3 bit, one slab", 4)
    assert (plain.rotates, plain.explicit, plain.groups, plain.dynamic) == (True, 1, 1, True)
    assert spec_of("3 bit, one slab", 5).groups == 2
    assert spec_of("3 bit, one slab", 64).groups == 2
    assert spec_of("soft-cap, sink logits", 1).softcap
    assert spec_of("1 bit, window over pages", 1).window
    other = spec_of("interleaved, scaled, far", 1)
    assert other.reorder
    assert other.stretched
    assert not spec_of("default, no RoPE, hidden", 1).rotates
    torch.use_deterministic_algorithms(True)
    try:
        assert not spec_of("3 bit, one slab", 1).dynamic
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("gluon_device")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("columns", [4, 8])
def test_programs_fit_a_multiprocessor(name: str, columns: int) -> None:
    spec = spec_of(name, columns)
    resident = launch.programs_per_multiprocessor(spec, launch.shared_memory(CUDA))
    assert resident >= 1
    assert resident * (Memory(spec).size + 1024) <= 227 * 1024
    limit = launch.register_limit(spec, resident)
    assert limit % 8 == 0 or limit == 255
    assert limit * 32 * spec.warps * resident <= 65536


@pytest.mark.usefixtures("gluon_device")
@pytest.mark.parametrize("programs", [1, 8, 64, 100, 500, 5000])
@pytest.mark.parametrize("pages", [1, 9, 100, 16384])
def test_splits(programs: int, pages: int) -> None:
    spec = spec_of("3 bit, one slab", 4)
    resident = launch.programs_per_multiprocessor(spec, launch.shared_memory(CUDA))
    wave = resident * launch.multiprocessors(CUDA)
    splits = launch.split_count(spec, programs, pages, wave)
    assert 1 <= splits <= max(1, -(-pages // spec.warps)), "a split without a page for any warp"
    assert splits == 1 or programs * splits <= max(wave, 8 * programs)
    if pages == 16384 and 2 * programs <= wave:
        assert programs * (splits + 1) > wave // 2, "most of the device is busy"


@pytest.mark.usefixtures("gluon_device")
def test_the_source_shown_is_the_kernel_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.SWITCH, "torch")  # no kernel for the CPU that the constants are on
    built = HALF_SERIES.build()
    shown = (built.layout, built.cache.tables, built.cache.geometry, Site(0.1, 0.0, 0, None), 4)
    ((name, text),) = kernels_source(*shown).items()
    assert name.startswith("history_"), "of any GPU"
    monkeypatch.setattr("kvquant_compile.lowering.source.use_gluon", lambda *_: True)
    monkeypatch.setattr(launch, "bulk_copies", lambda _: True)
    ((name, text),) = kernels_source(*shown).items()
    assert name == spec_of("3 bit, one slab", 4).name
    assert f"def {name}(" in text
    assert "mma.sync" in text
    compile(text, name, "exec")


def test_counters_belong_to_a_cache_and_grow() -> None:
    table, other = (NARROW.build().cache.table for _ in range(2))
    first = launch._counters(table, 2)
    assert launch._counters(table, 2) is first
    assert launch._counters(other, 2) is not first
    larger = launch._counters(table, 50)
    assert larger.numel() >= 50 * launch.COUNTER_WORDS
    assert not larger.any()
