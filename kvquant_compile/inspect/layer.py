"""One cache layer's part of a report: what was matched, how it was proved, what runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvquant_compile.capture.source_lines import source_line
from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.formats import Layout
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.choice import kernel_name, refusal
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.plan import LayerPlan

REFERENCE, GENERATED = "reference op", "generated kernel"
NO_KERNEL = "no kernels for position biases, chunks and chosen keys"


@dataclass(frozen=True)
class LayerReport:
    """One cache layer.

    Attributes:
        index: cache index.
        kv_heads, query_heads, key_dim, value_dim: geometry.
        rope: pairing and rotated channels, ``none``, or ``kept`` where keys are stored rotated.
        proof: how the rotation was established.
        source: line of the model that rotates.
        window, softcap, chunk: of the attention; 0 for none.
        position_bias: whether scores fall with the distance (ALiBi).
        selects: whether every query attends to keys of its choice only (sparse attention).
        bias_extent: distances for which every query computes a bias of its scores.
        recipe: name of the format.
        key_bits, value_bits: width of a code; of a recipe made of blocks, its own effective bits.
        slots: outlier slots of keys and values; "-" for such a recipe.
        effective_bits: of a full page, everything included.
        bytes_per_token: packed, one sequence; ``reference_bytes`` at the model's own dtype.
        exact_bytes: of exact tokens (sinks, a recipe's tail) beside the pages, one sequence.
        implementation: "generated kernel" or "reference op".
        kernel: which of them, and why.
        fallback: why the reference op runs; empty where a kernel does.
        refusal: why keys are not stored before RoPE, if they are not.
        certificate: the proof's evidence.
        sites: what was matched -> the line of the model's source that says it.
        plan: what the rewrite does: where keys are stored, the rotation, every attention that
            reads them, and the format string that its ops carry.
    """

    index: int
    kv_heads: int
    query_heads: int
    key_dim: int
    value_dim: int
    rope: str
    proof: str
    source: str
    window: int
    softcap: float
    recipe: str
    key_bits: float
    value_bits: float
    slots: str
    effective_bits: float
    bytes_per_token: float
    reference_bytes: int
    exact_bytes: int
    implementation: str
    kernel: str
    fallback: str
    refusal: str
    certificate: Mapping[str, Any]
    chunk: int = 0
    position_bias: bool = False
    selects: bool = False
    bias_extent: int = 0
    sites: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)


def layer_report(
    layer: MatchedLayer, layout: Layout, recipe: str, device: torch.device
) -> LayerReport:
    """The report of one layer."""
    plan = layer.plan
    site, cert = plan.attends[0], plan.certificate
    key_bits, value_bits, slots = _widths(layout)
    own = site.selects or site.query_sinks or site.bias_extent
    special = bool(site.chunk or site.position_bias or own)
    fallback = refusal(layout, device) or (NO_KERNEL if special else "")
    channels = plan.key_dim + plan.value_dim - plan.latent
    return LayerReport(
        index=plan.index,
        kv_heads=plan.kv_heads,
        query_heads=site.query_heads,
        key_dim=plan.key_dim,
        value_dim=plan.value_dim,
        rope=_rope(plan),
        proof=str(cert.get("method", "no rotation")),
        source=str(cert.get("source", "")),
        window=site.window,
        softcap=site.softcap,
        recipe=recipe,
        key_bits=key_bits,
        value_bits=value_bits,
        slots=slots,
        effective_bits=layout.effective_bits,
        bytes_per_token=plan.kv_heads * layout.page_bytes / PAGE_TOKENS,
        reference_bytes=plan.kv_heads * channels * layout.itemsize,
        exact_bytes=plan.kv_heads * layout.exact_rows * layout.exact_width * layout.itemsize,
        implementation=REFERENCE if fallback else GENERATED,
        kernel=kernel_name(layout, device, bias_or_chunks=special),
        fallback=fallback,
        refusal=plan.refusal,
        certificate=dict(cert),
        chunk=site.chunk,
        position_bias=site.position_bias,
        selects=site.selects,
        bias_extent=site.bias_extent,
        sites=_sites(layer),
        plan=_plan(plan, layout),
    )


def _widths(layout: Layout) -> tuple[float, float, str]:
    """Key bits, value bits, slots."""
    if isinstance(layout, BlockLayout):
        recipe = layout.recipe
        bits = (recipe.keys.effective_bits(layout.key_dim),
                recipe.values.effective_bits(layout.value_dim))  # fmt: skip
        return *bits, "-"
    spec = layout.spec
    return spec.key_bits, spec.value_bits, f"{spec.key_slots}+{spec.value_slots}"


def _rope(plan: LayerPlan) -> str:
    if plan.refusal or plan.kept is not None:
        return "kept"
    if plan.rope is None:
        return "none"
    turned = 2 * len(plan.rope.in_pairs)
    return f"{plan.rope.pairing} {turned}" + (f"/{plan.key_dim}" if turned < plan.key_dim else "")


def _sites(layer: MatchedLayer) -> dict[str, str]:
    """What the rewrite replaces or moves, by the line of source that it stands in."""
    nodes = {"key": layer.key, "value": layer.value, "append": layer.append}
    for number, attend in enumerate(layer.attends):
        name = "attention" if len(layer.attends) == 1 else f"attention {number}"
        nodes[f"query of {name}"] = attend.all_input_nodes[0]
        nodes[name] = attend
    lines = {name: source_line(node) for name, node in nodes.items()}
    return {name: str(line) for name, line in lines.items() if line is not None}


def _plan(plan: LayerPlan, layout: Layout) -> dict[str, Any]:
    rope, turned = plan.rope or plan.kept, {}
    if rope is not None:
        turned = {
            "pairing": rope.pairing,
            "pairs": len(rope.in_pairs),
            "passthrough": len(rope.passthrough),
            "scale": rope.scale,
            "radians_per_token": [max(rope.frequencies), min(rope.frequencies)],
        }
    return {
        "keys_stored": "before RoPE" if plan.rope is not None else "as they are attended",
        "rope": turned,
        "attends": [asdict(site) for site in plan.attends],
        "latent_channels": plan.latent,
        "format": str(layout),
    }
