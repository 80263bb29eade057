"""A report in sentences: what the terminal, the notebook and the HTML page all say.

A new part of a report becomes visible everywhere by a :class:`Fact` in :func:`facts` (of the
whole model) or :func:`layer_facts` (of one layer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.inspect.layer import GENERATED, REFERENCE, LayerReport
from kvquant_compile.inspect.report import Report
from kvquant_compile.memory.formulas import cache_formula

COLUMNS = ("layers", "heads q/kv", "dim", "RoPE", "proof", "mask", "recipe", "K/V bits",
           "eff. bits", "B/token", "runs")  # fmt: skip

UNSAID = ("fit", "mixed", "outlying_values")
"""What is recorded of a calibration and has a sentence of its own, or none."""


@dataclass(frozen=True)
class Fact:
    """A labelled sentence."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def headline(report: Report) -> str:
    """The whole model in one line."""
    return (
        f"{report.model} ({report.dtype}, {report.device}): {len(report.layers)} attention layers "
        f"rewritten, {report.effective_bits:.3f} effective bits, "
        f"{report.bytes_per_token:,.1f} bytes per token, {report.compression:.2f}x smaller"
    )


def facts(report: Report) -> list[Fact]:
    """What holds for the whole model."""
    exact = sum(layer.exact_bytes for layer in report.layers)
    shown = {k: v for k, v in report.calibration.items() if k not in UNSAID}
    found = [
        Fact("lossless rewrite against the original",
             f"worst relative error {report.worst_error:.1e} of {len(report.validation)} cases"),
        Fact("calibration", ", ".join(f"{k} {v}" for k, v in shown.items())),
    ]  # fmt: skip
    if exact:
        last = f", up to {report.recent} last ones" if report.recent else ""
        found.insert(
            0, Fact("beside the pages", f"{exact:,} bytes of exact tokens a sequence{last}")
        )
    found.insert(0, Fact("cache", f"{_cache(report)} bytes for T tokens of B sequences"))
    if "outlying_values" in report.calibration:
        found.append(Fact("outliers", _outlying(report.calibration["outlying_values"])))
    if "mixed" in report.calibration:
        found.append(Fact("widths", _mixture(report.calibration["mixed"])))
    if report.decode_step:
        found.append(Fact("decode step", report.decode_step))
    return found


def _outlying(parts: Mapping[str, float]) -> str:
    """Layers whose values have outliers."""
    least = math.floor(100 * min(parts.values()))
    return (
        f"an exact slot would take {least} % or more of the loss of values in layers "
        f"{', '.join(parts)}: slots=1 has one"
    )


def _cache(report: Report) -> str:
    """Bytes of these layers' cache as a formula."""
    sizes = [(round(PAGE_TOKENS * x.bytes_per_token), x.exact_bytes) for x in report.layers]
    return str(cache_formula(sizes))


def details(layers: Sequence[LayerReport]) -> list[tuple[str, list[Fact]]]:
    """(their indices, what was matched, proved and planned) of every kind of layer."""
    kinds: dict[Any, list[LayerReport]] = {}
    for layer in layers:
        alike = (tuple(layer.sites.items()), layer.rope, layer.proof, layer.refusal, runs_by(layer))
        kinds.setdefault(alike, []).append(layer)
    return [(indices(kind), layer_facts(kind)) for kind in kinds.values()]


def layer_facts(kind: Sequence[LayerReport]) -> list[Fact]:
    """What was matched, proved and planned in layers of one kind, and what runs them."""
    layer = kind[0]
    found = [Fact(name, line) for name, line in layer.sites.items()]
    found.append(Fact("proof", proof(kind)))
    if layer.refusal:
        found.append(Fact("keys kept rotated", layer.refusal))
    found.append(Fact("keys stored", str(layer.plan["keys_stored"]) + _moved(layer)))
    runs = runs_by(layer)
    unsaid = layer.fallback and layer.fallback not in runs
    return [*found, Fact("runs", f"{runs}: {layer.fallback}" if unsaid else runs)]


def _moved(layer: LayerReport) -> str:
    """What stood behind the rotation of keys and was moved."""
    moved = layer.certificate.get("moved", {})
    norm = ", behind their norm" if moved.get("norm") else ""
    return norm + (", their weights moved to the query" if moved.get("weights_to_query") else "")


def proof(kind: Sequence[LayerReport]) -> str:
    """How the rotation was established, with the largest residuals of some layers."""
    layer, certificates = kind[0], [layer.certificate for layer in kind]
    if "group_law_residual" not in layer.certificate:
        return layer.proof
    law, graph = (
        max(cert[name] for cert in certificates)
        for name in ("group_law_residual", "probe_relative_error")
    )
    return (
        f"{layer.proof}: {layer.rope}, R(a)R(b) = R(a+b) {_within(law)} at "
        f"{len(layer.certificate['group_law_points'])} points, the graph's own arithmetic "
        f"{_within(graph)}"
    )


def _within(error: float) -> str:
    return f"within {error:.0e}" if error else "exactly"


def groups(layers: Sequence[LayerReport]) -> list[list[LayerReport]]:
    """Neighbouring layers that differ in their index only, together."""
    found: list[list[LayerReport]] = []
    for report in layers:
        if found and _alike(found[-1][-1], report):
            found[-1].append(report)
        else:
            found.append([report])
    return found


def _alike(one: LayerReport, other: LayerReport) -> bool:
    return cells([one])[1:] == cells([other])[1:]


def indices(layers: Sequence[LayerReport]) -> str:
    """Cache indices, runs of them as ``first-last``."""
    runs: list[list[int]] = []
    for index in sorted(layer.index for layer in layers):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def cells(group: Sequence[LayerReport]) -> tuple[str, ...]:
    """A row of the table; see :data:`COLUMNS`."""
    first = group[0]
    dims = {first.key_dim, first.value_dim}
    return (
        indices(group),
        f"{first.query_heads}/{first.kv_heads}",
        "/".join(map(str, sorted(dims))),
        first.rope,
        first.proof,
        mask(first),
        first.recipe + ("" if first.slots in ("-", "0+0") else f" {first.slots}"),
        f"{first.key_bits:.4g}/{first.value_bits:.4g}",
        f"{first.effective_bits:.3f}",
        f"{first.bytes_per_token:.1f}",
        runs_by(first),
    )


def mask(layer: LayerReport) -> str:
    """What a query sees."""
    sizes = {"window": layer.window, "chunks of": layer.chunk}
    parts = [f"{name} {size}" for name, size in sizes.items() if size] or ["causal"]
    parts += [f"cap {layer.softcap:g}"] if layer.softcap else []
    more = {"ALiBi": layer.position_bias, "chosen keys": layer.selects,
            f"bias of {layer.bias_extent} distances": layer.bias_extent}  # fmt: skip
    return ", ".join(parts + [name for name, there in more.items() if there])


def runs_by(layer: LayerReport) -> str:
    """The kernel variant, or the reference op."""
    if layer.implementation == REFERENCE:
        return layer.kernel.replace("torch", REFERENCE, 1)
    return f"{GENERATED}: {layer.kernel}"


def _mixture(mixed: Mapping[str, Any]) -> str:
    """How the widths were chosen."""
    how = "measured one at a time" if mixed["method"] == "measured" else "from gradients"
    return (
        f"chosen for {mixed['asked']} ({mixed['bytes_per_token']:,.1f} bytes a token), "
        f"losses {how}, expected KL {mixed['expected_kl']:.4f} nats"
    )
