"""What ``explain`` returns: matched, proved, rewritten, what runs, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.capture.captured import Captured
from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.formats import Layout
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.errors import OptionError
from kvquant_compile.inspect.source import LayerSource
from kvquant_compile.lowering.triton.dispatch import kernel_name, refusal
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.plan import LayerPlan
from kvquant_compile.runtime.program import Program

REFERENCE, GENERATED = "reference op", "generated kernel"


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
        recipe: name of the format.
        key_bits, value_bits: width of a code; of a recipe made of blocks, its own effective bits.
        slots: outlier slots of keys and values; "-" for such a recipe.
        effective_bits: of a full page, everything included.
        bytes_per_token: packed, one sequence; ``reference_bytes`` at the model's own dtype.
        exact_bytes: of exact tokens (sinks, a recipe's tail) beside the pages, one sequence.
        implementation: "generated kernel" or "reference op".
        kernel: which of them, and why.
        refusal: why keys are not stored before RoPE, if they are not.
        certificate: the proof's evidence.
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
    refusal: str
    certificate: Mapping[str, Any]
    chunk: int = 0
    position_bias: bool = False


@dataclass(frozen=True)
class Report:
    """An optimised model's report; ``print`` it, or take :meth:`to_dict`.

    Attributes:
        model: class name.
        convention: how it was captured.
        dtype, device: baked into the graph.
        layers: one report per cache layer.
        validation: case -> relative error of the lossless rewrite against the original.
        calibration: where tables came from and how long each stage took.
        sinks: exact leading tokens.
        decode_step: how a step of one token per sequence runs.
        sources: generated kernels, where they were asked for.
    """

    model: str
    convention: str
    dtype: str
    device: str
    layers: tuple[LayerReport, ...]
    validation: Mapping[str, float]
    calibration: Mapping[str, Any]
    sinks: int
    decode_step: str = ""
    sources: tuple[LayerSource, ...] = ()

    @property
    def effective_bits(self) -> float:
        """Bits per element over all layers, full pages."""
        elements = sum(r.kv_heads * (r.key_dim + r.value_dim) for r in self.layers)
        return 8 * self.bytes_per_token / elements

    @property
    def bytes_per_token(self) -> float:
        """Packed bytes of a token of one sequence, all layers."""
        return sum(r.bytes_per_token for r in self.layers)

    @property
    def compression(self) -> float:
        """Bytes at the model's dtype over packed bytes."""
        return sum(r.reference_bytes for r in self.layers) / self.bytes_per_token

    def only(self, index: int) -> Report:
        """The report of one cache layer; totals are its own.

        Raises:
            OptionError: there is no such layer.
        """
        kept = tuple(x for x in self.layers if x.index == index)
        if not kept:
            raise OptionError(
                f"layer={index!r}",
                why=f"the cache layers are {', '.join(str(x.index) for x in self.layers)}",
                do="Pass one of these.",
            )
        return replace(self, layers=kept)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict of everything; sources only where they were asked for."""
        totals = {
            "effective_bits": self.effective_bits,
            "bytes_per_token": self.bytes_per_token,
            "compression": self.compression,
        }
        record = asdict(self) | {"totals": totals}
        if not self.sources:
            del record["sources"]
        return record

    def __rich__(self) -> Group:
        worst = max(self.validation.values(), default=0.0)
        head = (
            f"{self.model} ({self.dtype}, {self.device}): {len(self.layers)} attention layers "
            f"rewritten, {self.effective_bits:.3f} effective bits, "
            f"{self.bytes_per_token:,.1f} bytes per token, {self.compression:.2f}x smaller"
        )
        exact = sum(report.exact_bytes for report in self.layers)
        proof = f"lossless rewrite against the original: worst relative error {worst:.1e}"
        shown = {k: v for k, v in self.calibration.items() if k not in ("fit", "mixed")}
        beside = f"beside the pages: {exact:,} bytes of exact tokens a sequence"
        origin = "calibration: " + ", ".join(f"{k} {v}" for k, v in shown.items())
        lines = [*([beside] if exact else []), proof, origin]
        lines += [_mixture(self.calibration["mixed"])] if "mixed" in self.calibration else []
        lines += [f"decode step: {self.decode_step}"] if self.decode_step else []
        texts = [Text("\n" + str(source)) for source in self.sources]
        return Group(Text(head, style="bold"), self._table(), *map(Text, lines), *texts)

    def _table(self) -> Table:
        table = Table(show_edge=False, pad_edge=False)
        names = ("layers", "heads q/kv", "dim", "RoPE", "proof", "mask", "recipe", "K/V bits",
                 "eff. bits", "B/token", "runs")  # fmt: skip
        for name in names:
            table.add_column(name)
        for group in _runs(self.layers):
            table.add_row(*_cells(group))
        for report in self.layers:
            if report.refusal:
                table.caption = f"layer {report.index}: keys kept rotated: {report.refusal}"
        return table

    def __str__(self) -> str:
        console = Console(width=150, record=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _runs(layers: Sequence[LayerReport]) -> list[list[LayerReport]]:
    """Neighbouring layers that differ in their index only, together."""
    groups: list[list[LayerReport]] = []
    for report in layers:
        if groups and _cells([groups[-1][-1]])[1:] == _cells([report])[1:]:
            groups[-1].append(report)
        else:
            groups.append([report])
    return groups


def _cells(group: list[LayerReport]) -> tuple[str, ...]:
    first, last = group[0], group[-1]
    span = str(first.index) if first is last else f"{first.index}-{last.index}"
    dims = {first.key_dim, first.value_dim}
    return (
        span,
        f"{first.query_heads}/{first.kv_heads}",
        "/".join(map(str, sorted(dims))),
        first.rope,
        first.proof,
        _mask(first),
        first.recipe + ("" if first.slots in ("-", "0+0") else f" {first.slots}"),
        f"{first.key_bits:.4g}/{first.value_bits:.4g}",
        f"{first.effective_bits:.3f}",
        f"{first.bytes_per_token:.1f}",
        _runs_by(first),
    )


def _mask(layer: LayerReport) -> str:
    sizes = {"window": layer.window, "chunks of": layer.chunk}
    parts = [f"{name} {size}" for name, size in sizes.items() if size] or ["causal"]
    parts += [f"cap {layer.softcap:g}"] if layer.softcap else []
    return ", ".join(parts + (["ALiBi"] if layer.position_bias else []))


def _runs_by(report: LayerReport) -> str:
    if report.implementation == REFERENCE:
        return report.kernel.replace("torch", REFERENCE, 1)
    return f"{GENERATED}: {report.kernel}"


def describe_decode(refusal: str) -> str:
    """How decode steps run; ``refusal`` is why not as a CUDA graph."""
    return f"eager, no CUDA graph: {refusal}" if refusal else "CUDA graph"


def layer_report(plan: LayerPlan, layout: Layout, recipe: str, device: torch.device) -> LayerReport:
    """The report of one layer."""
    site, cert = plan.attends[0], plan.certificate
    key_bits, value_bits, slots = _widths(layout)
    torch_only = refusal(layout, device) or site.chunk or site.position_bias
    channels = plan.key_dim + plan.value_dim - plan.latent
    reference = plan.kv_heads * channels * layout.itemsize
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
        reference_bytes=reference,
        exact_bytes=plan.kv_heads * layout.exact_rows * layout.exact_width * layout.itemsize,
        implementation=REFERENCE if torch_only else GENERATED,
        kernel=kernel_name(layout, device, bias_or_chunks=bool(site.chunk or site.position_bias)),
        refusal=plan.refusal,
        certificate=dict(cert),
        chunk=site.chunk,
        position_bias=site.position_bias,
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


def _mixture(mixed: Mapping[str, Any]) -> str:
    """How the widths were chosen."""
    how = "measured one at a time" if mixed["method"] == "measured" else "from gradients"
    return (
        f"widths: chosen for {mixed['asked']} ({mixed['bytes_per_token']:,.1f} bytes a token), "
        f"losses {how}, expected KL {mixed['expected_kl']:.4f} nats"
    )


def _rope(plan: LayerPlan) -> str:
    if plan.refusal or plan.kept is not None:
        return "kept"
    if plan.rope is None:
        return "none"
    turned = 2 * len(plan.rope.in_pairs)
    return f"{plan.rope.pairing} {turned}" + (f"/{plan.key_dim}" if turned < plan.key_dim else "")


def _recipe_name(layout: Layout, artifact: Artifact) -> str:
    if isinstance(layout, BlockLayout):
        return layout.recipe.name
    return "lossless" if layout.lossless else str(artifact.details.get("recipe", "kvquant+"))


def build_report(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    program: Program,
    validation: Mapping[str, float],
    artifact: Artifact,
) -> Report:
    """The report of one optimised model."""
    return Report(
        model=type(captured.model).__name__,
        convention=captured.convention,
        dtype=str(program.dtype).removeprefix("torch."),
        device=str(program.device),
        layers=tuple(
            layer_report(layer.plan, layout, _recipe_name(layout, artifact), program.device)
            for layer, layout in zip(layers, program.layouts, strict=True)
        ),
        validation=dict(validation),
        calibration=artifact.details,
        sinks=max((layout.sink_tokens for layout in program.layouts), default=0),
    )
