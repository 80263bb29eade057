"""Calibrated tables as a file: one safetensors file whose metadata is JSON, bound to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvquant_compile.calib.fingerprint import fingerprint
from kvquant_compile.capture.captured import Captured
from kvquant_compile.codec.algebra.recipe import Recipe, RecipeTables
from kvquant_compile.codec.formats import Format, Tables
from kvquant_compile.codec.spec import CodecSpec, LayerTables
from kvquant_compile.errors import ArtifactError
from kvquant_compile.files import FileKind
from kvquant_compile.passes.recognise import MatchedLayer

_REDO = "Calibrate again with kvquant_compile.optimize and save the artifact anew."
_FILE = FileKind(
    "artifact", "kvquant_compile tables", "3", ArtifactError, _REDO
)  # 2: key_feedback in pair order; 3: fingerprint without what saving a model changes


@dataclass(frozen=True, eq=False)
class Artifact:
    """Formats and tables of every layer.

    Attributes:
        specs: cache index -> format.
        tables: cache index -> constants; lossless layers have none.
        model: fingerprint of the model they were fitted for.
        geometry: cache index -> (kv heads, key dim, value dim).
        details: JSON-able record of how they were made.
    """

    specs: Mapping[int, Format]
    tables: Mapping[int, Tables]
    model: str
    geometry: Mapping[int, tuple[int, int, int]]
    details: Mapping[str, Any]

    def __repr__(self) -> str:
        total = sum(t.nbytes for tables in self.tables.values() for t in tables.tensors().values())
        name = self.details.get("recipe", "formats")
        return f"Artifact({name}, {len(self.specs)} layers, {total:,} bytes of tables)"

    @staticmethod
    def make(
        captured: Captured,
        layers: Sequence[MatchedLayer],
        specs: Mapping[int, Format],
        tables: Mapping[int, Tables],
        details: Mapping[str, Any],
    ) -> Artifact:
        """Bind tables to a captured model."""
        return Artifact(
            dict(specs), dict(tables), fingerprint(captured.model), _geometry(layers), dict(details)
        )

    def for_model(
        self, captured: Captured, layers: Sequence[MatchedLayer]
    ) -> tuple[dict[int, Format], dict[int, Tables | None]]:
        """Formats and tables by cache index, after checking that they are this model's.

        Raises:
            ArtifactError: they were fitted for another model.
        """
        if self.model != fingerprint(captured.model) or self.geometry != _geometry(layers):
            raise ArtifactError(
                "the artifact belongs to another model",
                why="its fingerprint (config, parameter shapes, weight samples) differs",
                do=_REDO,
            )
        return dict(self.specs), {index: self.tables.get(index) for index in self.specs}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {
            f"{index}.{name}": tensor
            for index, tables in self.tables.items()
            for name, tensor in tables.tensors().items()
        }
        header = {
            "model": self.model,
            "specs": {str(i): _described(spec) for i, spec in self.specs.items()},
            "geometry": {str(i): list(g) for i, g in self.geometry.items()},
            "details": dict(self.details),
        }
        _FILE.write(path, header, tensors)

    @staticmethod
    def load(path: str | Path) -> Artifact:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: no such file, no artifact, another version, or damaged.
        """
        header, tensors = _FILE.read(path)
        specs = {int(i): _format(spec) for i, spec in header["specs"].items()}
        geometry = {int(i): (g[0], g[1], g[2]) for i, g in header["geometry"].items()}
        tables = {i: _tables(i, spec, tensors) for i, spec in specs.items() if not spec.lossless}
        return Artifact(specs, tables, header["model"], geometry, header["details"])


def _described(spec: Format) -> Any:
    """A format as JSON: a recipe by its text, others by their fields."""
    if isinstance(spec, Recipe):
        return str(spec)
    fields = asdict(spec)
    if not spec.recent_tokens:  # artifacts without them stay what they were
        del fields["recent_tokens"]
    return fields


def _format(described: Any) -> Format:
    return Recipe.parse(described) if isinstance(described, str) else CodecSpec(**described)


def _tables(index: int, spec: Format, tensors: Mapping[str, torch.Tensor]) -> Tables:
    if isinstance(spec, Recipe):
        return RecipeTables(spec.names, tuple(tensors[f"{index}.{name}"] for name in spec.names))
    names = LayerTables.__dataclass_fields__
    return LayerTables(**{name: tensors[f"{index}.{name}"] for name in names})


def _geometry(layers: Sequence[MatchedLayer]) -> dict[int, tuple[int, int, int]]:
    plans = [layer.plan for layer in layers]
    return {p.index: (p.kv_heads, p.key_dim, p.value_dim) for p in plans}
