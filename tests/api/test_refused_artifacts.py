"""Artifacts that cannot be used are refused before anything is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import kvquant_compile
from kvquant_compile import ArtifactError
from tests.api.helpers import TEXT
from tests.api.untouched import Untouched
from tests.zoo import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = kvquant_compile.optimize(tiny("llama"), bits=2, calibration=TEXT)
    path = tmp_path_factory.mktemp("artifact") / "tables.safetensors"
    kvquant_compile.artifact(model).save(path)
    return path


def test_the_artifact_of_another_model(llama: Untouched, saved: Path) -> None:
    other = Untouched(tiny("llama", seed=1))
    other.refuses(ArtifactError, "another model", calibration=saved)
    wider = Untouched(tiny("llama", hidden_size=32))
    wider.refuses(ArtifactError, "another model", calibration=str(saved))


def test_a_missing_artifact(llama: Untouched, tmp_path: Path) -> None:
    llama.refuses(ArtifactError, "does not exist", calibration=tmp_path / "no.safetensors")
    llama.refuses(ArtifactError, "does not exist", calibration=str(tmp_path / "no.safetensors"))


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.99])
def test_a_truncated_artifact(llama: Untouched, saved: Path, tmp_path: Path, kept: float) -> None:
    content, path = saved.read_bytes(), tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    llama.refuses(ArtifactError, "damaged", calibration=path)


@pytest.mark.parametrize("part", range(8))
def test_an_artifact_with_a_flipped_byte(
    llama: Untouched, saved: Path, tmp_path: Path, part: int
) -> None:
    content, path = bytearray(saved.read_bytes()), tmp_path / "flipped.safetensors"
    content[20 + part * (len(content) - 21) // 7] ^= 1
    path.write_bytes(content)
    llama.refuses(ArtifactError, "damaged|cannot be used", calibration=path)


@pytest.mark.parametrize("change", [{"version": "1"}, {"kind": "weights"}, {"checksum": "0"}])
def test_an_artifact_of_another_kind_or_version(
    llama: Untouched, saved: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    with safe_open(saved, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata=metadata | change)
    llama.refuses(ArtifactError, "damaged|version", calibration=path)
