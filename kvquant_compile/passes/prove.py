"""One path from an un-rotated head vector to a rotated one: find it, prove it, probe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.capture.source_lines import source_line
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.passes.angles import AngleReader
from kvquant_compile.passes.group_law import POINTS, group_law_residual
from kvquant_compile.passes.rope_numeric import apply_rope
from kvquant_compile.passes.rotation import parse_rows, rotation_of
from kvquant_compile.passes.symbolic import POSITION, Interpreter
from kvquant_compile.passes.symbols import NotInterpretable, Symbolic
from kvquant_compile.passes.taint import (
    Taint,
    float_value,
    rotation_site,
    taint,
    without_factors,
    writer_in_place,
)
from kvquant_compile.plan import RopeSpec

GROUP_TOLERANCE = 1e-9
PROBE_TOLERANCE = 1e-5
_PROBE_START, _PROBE_TOKENS, _PROBE_BATCH = 11, 5, 2


@dataclass(frozen=True)
class Proof:
    """The outcome for one path.

    Attributes:
        pre: the node the path starts from; None if none was found.
        layout: how ``pre`` holds [B, H, S, D]: ``bhsd``, ``bshd`` or ``flat`` ([B, S, H*D]).
        spec: the rotation; None when nothing rotates, or when it was refused.
        refusal: why a rotation was not proved; empty otherwise.
        evidence: JSON-able certificate.
    """

    pre: fx.Node | None
    layout: str
    spec: RopeSpec | None
    refusal: str
    evidence: dict[str, Any]


def counts_columns(gm: fx.GraphModule) -> bool:
    """Whether a graph takes no positions, so that those it knows are columns of its cache."""
    taken = gm.graph.find_nodes(op="placeholder")
    return not any(node.target == "position_ids" and node.users for node in taken)


class Prover:
    """Proves rotations of one captured graph; what depends on no data is worked out once."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.known: Taint = taint(captured.graph_module.graph, *captured.data_inputs)
        self.interpreter = Interpreter(
            captured.graph_module, by_columns=counts_columns(captured.graph_module)
        )
        self.reader = AngleReader(captured, self.interpreter)

    def prove(self, end: fx.Node) -> Proof:
        """Prove the rotation that ends in ``end``, [B, H, S, D]; never raises for a refusal."""
        site = rotation_site(end, self.known)
        if not site.mixed:
            writer = writer_in_place(end, self.known)
            if writer is not None:
                return _refused(f"{writer.name} writes into it in place, so that what it depends on"
                                " is not known")  # fmt: skip
            return Proof(end, "bhsd", None, "", {"method": "no position reaches this tensor"})
        if site.pre is None:
            return _refused("positions are mixed in, but not into one single tensor")
        try:
            layout = _layout(site.pre, end)
            return self._prove(site.pre, layout, end)
        except NotInterpretable as reason:
            return _refused(f"what happens between {site.pre.name} and {end.name} is no proved"
                            f" rotary embedding: {reason}")  # fmt: skip

    def prove_query(self, end: fx.Node) -> Proof:
        """As :meth:`prove`, for a query: a factor of every token of its own is part of the score
        (ministral3 and llama4 scale queries by the logarithm of their position), so is one of
        every channel (:mod:`.norms`); and the order of heads does not matter
        (:mod:`.head_maps`)."""
        end = without_factors(end, self.known)
        if end.target is torch.ops.aten.index_select.default and end.args[1] == 1:
            (end, _) = end.all_input_nodes
        return self.prove(without_factors(end, self.known))

    def _prove(self, pre: fx.Node, layout: str, end: fx.Node) -> Proof:
        heads, _, width = float_value(end).shape[1:]
        channels = [sympy.Symbol(f"x{c}", real=True) for c in range(width)]
        outputs = self._interpret(pre, layout, end, int(heads), channels)
        self.interpreter.lookups.note_angles(outputs)
        fits, misfit = self.interpreter.lookups.fitted()
        outputs = [output.xreplace(fits) for output in outputs]
        rotation = rotation_of(parse_rows(outputs, channels, POSITION))
        turning = [o for pair in rotation.out_pairs for o in pair]
        law = group_law_residual(rotation.rows, turning, rotation.scale)
        if not law <= GROUP_TOLERANCE:
            raise NotInterpretable(f"the group law fails by {law:.1e}")
        if not rotation.in_pairs:
            raise NotInterpretable("every channel passes through unchanged")
        frequencies, angle_error = self.reader.exact(rotation.frequencies)
        spec = RopeSpec(
            rotation.in_pairs, rotation.out_pairs, frequencies, rotation.passthrough, rotation.scale
        )
        probe = self.probe(pre, layout, end, spec, tolerance_for_tables=misfit)
        evidence = {
            "method": "symbolic", "pairing": spec.pairing, "channels": int(width),
            "pairs": len(spec.in_pairs), "scale": spec.scale,
            "group_law_points": [list(point) for point in POINTS], "group_law_residual": law,
            "angle_relative_error": angle_error, "table_misfit": misfit,
            "probe_relative_error": probe, "source": str(source_line(end) or ""),
        }  # fmt: skip
        return Proof(pre, layout, spec, "", evidence)

    def _interpret(
        self, pre: fx.Node, layout: str, end: fx.Node, heads: int, channels: list[sympy.Symbol]
    ) -> list[sympy.Expr]:
        pool = self.interpreter.pool
        row = torch.tensor([pool.intern(x) for x in channels])
        vector = row.expand(1, heads, 1, len(channels))
        result = self.interpreter.run(pre, Symbolic(from_heads(vector, layout)), end).index
        if result.shape != vector.shape:
            raise NotInterpretable(f"one token has shape {tuple(result.shape)} there")
        if not bool((result == result[:, :1]).all()):
            raise NotInterpretable("heads are rotated differently")
        entries = [pool.scalars[i] for i in result[0, 0, 0].tolist()]
        if any(imaginary != 0 for _, imaginary in entries):
            raise NotInterpretable("the rotated vector is complex")
        return [real for real, _ in entries]

    def probe(
        self,
        pre: fx.Node,
        layout: str,
        end: fx.Node,
        spec: RopeSpec,
        *,
        tolerance_for_tables: float = 0.0,
    ) -> float:
        """Relative error of the graph against the plain reference, both in float32 at least.

        Inputs are random, of a different size for every head and token, so that a norm or a
        mix of heads would show.

        Raises:
            NotInterpretable: they differ.
        """
        like = float_value(end)
        heads, width = int(like.shape[1]), int(like.shape[3])
        shape = (_PROBE_BATCH, heads, _PROBE_TOKENS, width)
        generator = torch.Generator().manual_seed(0)
        size = torch.rand(*shape[:3], 1, generator=generator) * 4 + 0.25
        x = (torch.randn(shape, generator=generator) * size).to(self.captured.device, like.dtype)
        values = input_values(self.captured.graph_module, _PROBE_START, _PROBE_TOKENS, _PROBE_BATCH)
        values[pre] = from_heads(x, layout)
        with torch.no_grad():
            run = Evaluator(self.captured.graph_module, values, widen=self.captured.dtype)
            got = run(end).float()
        positions = torch.arange(_PROBE_START, _PROBE_START + _PROBE_TOKENS, device=x.device)
        expected = apply_rope(x, positions, spec)
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= PROBE_TOLERANCE + tolerance_for_tables:
            raise NotInterpretable(f"the graph differs from the proved rotation by {error:.1e}")
        return error


def _refused(why: str) -> Proof:
    return Proof(None, "bhsd", None, why, {"method": "refused", "reason": why})


def _layout(pre: fx.Node, end: fx.Node) -> str:
    heads, width = (int(float_value(end).shape[i]) for i in (1, 3))
    shape = list(float_value(pre).shape)
    if len(shape) == 4 and shape[3] == width:
        if shape[1] == heads and not isinstance(shape[2], int):
            return "bhsd"
        if shape[2] == heads and not isinstance(shape[1], int):
            return "bshd"
    if len(shape) == 3 and shape[2] == heads * width:
        return "flat"
    raise NotInterpretable(f"the tensor before it has shape {shape}, which is no head layout")


def from_heads(x: Tensor, layout: str) -> Tensor:
    """[B, H, S, D] in the layout of the path's first node."""
    if layout == "bhsd":
        return x
    moved = x.transpose(1, 2)
    return moved if layout == "bshd" else moved.flatten(2)
