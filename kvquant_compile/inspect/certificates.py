"""Proofs as files: one JSON certificate per cache layer, which can be checked without the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.errors import OptionError
from kvquant_compile.passes.head_view import HeadView
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.plan import RopeSpec

SCHEMA = 1
_POSITIONS = (1, 5, 23)


def certificates(
    captured: Captured, layers: Sequence[MatchedLayer], validation: Mapping[str, float]
) -> dict[int, dict[str, Any]]:
    """Certificates of an optimised model's layers, JSON-able, by cache index.

    Args:
        captured: the model.
        layers: what was proved.
        validation: case -> relative error of the lossless rewrite.

    Returns:
        For every layer ``schema``, ``model``, ``layer``, ``keys`` ("before RoPE", "behind RoPE" or
        "not rotated"), ``refusal``, ``rope`` (the fields of :class:`kvquant_compile.plan.RopeSpec`,
        or None), ``samples`` ([position, head vector before, after the model's own rotation]),
        ``attends``, ``evidence`` (method, residuals, source line), ``validation``, ``versions``.
    """
    return {layer.plan.index: _certificate(captured, layer, validation) for layer in layers}


def _certificate(
    captured: Captured, layer: MatchedLayer, validation: Mapping[str, float]
) -> dict[str, Any]:
    from kvquant_compile import __version__

    plan = layer.plan
    evidence = dict(plan.certificate)
    versions = {"kvquant_compile": __version__}
    versions |= {name: evidence.pop(name) for name in ("torch", "transformers") if name in evidence}
    rope = plan.rope or plan.kept
    behind = plan.kept is not None or bool(plan.refusal)
    record = {
        "schema": SCHEMA,
        "model": type(captured.model).__name__,
        "layer": plan.index,
        "keys": "behind RoPE" if behind else "before RoPE" if rope else "not rotated",
        "refusal": plan.refusal,
        "kv_heads": plan.kv_heads,
        "key_dim": plan.key_dim,
        "value_dim": plan.value_dim,
        "rope": None if rope is None else asdict(rope),
        "samples": _samples(captured, layer),
        "attends": [asdict(site) for site in plan.attends],
        "evidence": evidence,
        "validation": dict(validation),
        "versions": versions,
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def save(found: Mapping[int, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Write ``layer-000.json`` and so on; the folder is made if there is none.

    Returns:
        The files.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    files = []
    for index, record in sorted(found.items()):
        file = place / f"layer-{index:03}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
        files.append(file)
    return files


def verify(record: Mapping[str, Any]) -> float:
    """Check a certificate from its file alone.

    The stated rotation must use every channel once, and must give, computed here in float64, the
    rotated vectors that the model's own graph gave for the recorded ones.

    Args:
        record: a certificate, as loaded from its file.

    Returns:
        The largest relative error over the samples; 0 where nothing is rotated.

    Raises:
        OptionError: it is of another schema, has no sample, or uses a channel twice or never.
    """
    if record.get("schema") != SCHEMA:
        raise _bad(f"its schema is {record.get('schema')}, not {SCHEMA}")
    if record["rope"] is None:
        return 0.0
    spec = RopeSpec(**{name: _tuples(value) for name, value in record["rope"].items()})
    for side, pairs in ((0, spec.in_pairs), (1, spec.out_pairs)):
        used = [c for pair in pairs for c in pair] + [pair[side] for pair in spec.passthrough]
        if sorted(used) != list(range(record["key_dim"])):
            raise _bad("a channel is used twice, or lost")
    if not record["samples"]:
        raise _bad("it has no sample")
    errors = []
    for position, before, after in record["samples"]:
        difference = _rotated(np.array(before), position, spec) - np.array(after)
        errors.append(float(np.abs(difference).max() / np.abs(after).max()))
    return max(errors)


def _rotated(x: np.ndarray, position: int, spec: RopeSpec) -> np.ndarray:
    y = np.zeros_like(x)
    for (a, b), (c, d), rate in zip(spec.in_pairs, spec.out_pairs, spec.frequencies, strict=True):
        turned = spec.scale * complex(x[a], x[b]) * np.exp(1j * position * rate)
        y[c], y[d] = turned.real, turned.imag
    for source, target in spec.passthrough:
        y[target] = x[source]
    return y


def _samples(captured: Captured, layer: MatchedLayer) -> list[list[Any]]:
    """[position, head vector before the rotation, after it], by the model's own arithmetic."""
    if layer.plan.rope is None:
        return []
    view = HeadView.of(layer.key_pre)
    generator = torch.Generator().manual_seed(layer.plan.index)
    shape = (1, layer.plan.kv_heads, 1, layer.plan.key_dim)
    samples = []
    for position in _POSITIONS:
        x = torch.randn(shape, generator=generator).to(captured.device, captured.dtype)
        values = input_values(captured.graph_module, position, 1, 1)
        values[view.node] = view.undo(x)
        with torch.no_grad():
            y = Evaluator(captured.graph_module, values)(layer.key)
        samples.append([position, *(t[0, 0, 0].double().tolist() for t in (x, y))])
    return samples


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _bad(why: str) -> OptionError:
    return OptionError(
        "a certificate cannot be checked", why=why, do="Write it again with explain --certificates."
    )
