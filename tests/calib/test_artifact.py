from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.fingerprint import fingerprint
from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.errors import ArtifactError
from tests.codec.cases import random_tables


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def parts(net: nn.Module, dim: int = 32) -> tuple[Any, Any]:
    plans = [SimpleNamespace(index=i, kv_heads=2, key_dim=dim, value_dim=dim) for i in range(2)]
    return SimpleNamespace(model=net), [SimpleNamespace(plan=plan) for plan in plans]


def make() -> Artifact:
    specs = {0: CodecSpec(3, 2, key_token_scale=True), 1: CodecSpec(16, 16)}
    tables = {0: random_tables(specs[0], 2, 32, 0, True)}
    return Artifact.make(*parts(model()), specs, tables, {"windows": 4})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make().save(tmp_path / "tables.safetensors")
    return tmp_path / "tables.safetensors"


def test_round_trip(path: Path) -> None:
    saved, loaded = make(), Artifact.load(path)
    assert loaded.specs == saved.specs
    assert loaded.details == saved.details
    specs, tables = loaded.for_model(*parts(model()))
    assert specs == saved.specs
    assert tables[1] is None
    assert tables[0] is not None
    for name, tensor in saved.tables[0].tensors().items():
        got = tables[0].tensors()[name]
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)


def test_another_model_is_refused(path: Path) -> None:
    loaded = Artifact.load(path)
    for captured, layers in (parts(model(1)), parts(model(), dim=16)):
        with pytest.raises(ArtifactError, match="another model"):
            loaded.for_model(captured, layers)


def test_missing_and_truncated_files_are_refused(path: Path) -> None:
    with pytest.raises(ArtifactError):
        Artifact.load(path.with_name("absent.safetensors"))
    content = path.read_bytes()
    for length in (0, 4, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            Artifact.load(path)


def test_flipped_bytes_are_refused(path: Path) -> None:
    content = path.read_bytes()
    places = torch.randint(len(content), (60,), generator=torch.Generator().manual_seed(0))
    for place in places.tolist():
        if content[place : place + 1] == b" ":
            continue
        broken = bytearray(content)
        broken[place] ^= 0x11
        path.write_bytes(bytes(broken))
        with pytest.raises(ArtifactError):
            Artifact.load(path)


@pytest.mark.parametrize("change", [{"version": "999"}, {"kind": "other"}, {"header": "{}"}, None])
def test_foreign_metadata_is_refused(path: Path, change: dict[str, str] | None) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=None if change is None else {**metadata, **change})
    with pytest.raises(ArtifactError):
        Artifact.load(path)


def test_fingerprint_depends_on_weights_and_not_on_dtype_or_copies() -> None:
    net = model()
    assert fingerprint(net) == fingerprint(model())
    assert fingerprint(net) != fingerprint(model(1))
    half = model().bfloat16()
    assert fingerprint(half) == fingerprint(model().bfloat16().float())
    with torch.no_grad():
        net[0].weight[0, 0] += 1
    assert fingerprint(net) != fingerprint(model())


def test_sampled_places_stay_inside_huge_parameters() -> None:
    from kvquant_compile.calib.fingerprint import _places

    for count in (1, 63, 2**25 + 4, 2**31 + 3):
        assert int(_places(count).max()) == count - 1
