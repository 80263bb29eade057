"""What ``explain`` returns: matched, proved, rewritten, what runs, and what it costs.

The record is here; :mod:`.facts` says it in sentences, :mod:`.terminal` and :mod:`.notebook`
print it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.capture.captured import Captured
from kvquant_compile.codec.algebra.layout import BlockLayout
from kvquant_compile.codec.formats import Layout
from kvquant_compile.errors import OptionError
from kvquant_compile.inspect.layer import LayerReport, layer_report
from kvquant_compile.inspect.source import LayerSource
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.runtime.program import Program

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Report:
    """An optimised model's report; ``print`` it, show it in a notebook, or take :meth:`to_dict`.

    Attributes:
        model: class name.
        convention: how it was captured.
        dtype, device: baked into the graph.
        layers: one report per cache layer.
        validation: case -> relative error of the lossless rewrite against the original.
        calibration: where tables came from and how long each stage took.
        sinks: exact leading tokens.
        recent: exact last tokens.
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
    recent: int = 0
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

    @property
    def worst_error(self) -> float:
        """Largest relative error of the lossless rewrite against the original."""
        return max(self.validation.values(), default=0.0)

    @property
    def refused(self) -> dict[int, str]:
        """Cache index -> why its keys are not stored before RoPE, where they are not."""
        return {layer.index: layer.refusal for layer in self.layers if layer.refusal}

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
        refused = {str(index): why for index, why in self.refused.items()}
        record = asdict(self) | {"totals": totals, "refused": refused}
        if not self.sources:
            del record["sources"]
        return record

    def __rich__(self) -> Group:
        from kvquant_compile.inspect.terminal import rendered

        return rendered(self)

    def __str__(self) -> str:
        from kvquant_compile.inspect.terminal import as_text

        return as_text(self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from kvquant_compile.inspect.notebook import as_html

        return as_html(self)


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
            layer_report(layer, layout, _recipe_name(layout, artifact), program.device)
            for layer, layout in zip(layers, program.layouts, strict=True)
        ),
        validation=dict(validation),
        calibration=artifact.details,
        sinks=max((layout.sink_tokens for layout in program.layouts), default=0),
        recent=max((layout.ring for layout in program.layouts), default=0),
    )


def _recipe_name(layout: Layout, artifact: Artifact) -> str:
    if isinstance(layout, BlockLayout):
        return layout.recipe.name
    return "lossless" if layout.lossless else str(artifact.details.get("recipe", "kvquant+"))
