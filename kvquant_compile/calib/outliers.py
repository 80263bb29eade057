"""Layers whose values have outliers that a slot would hold exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kvquant_compile.calib.fit_values import expected_loss
from kvquant_compile.calib.observe import Observed
from kvquant_compile.codec.formats import Format, Tables
from kvquant_compile.codec.spec import CodecSpec, LayerTables

WORTH = 0.5
"""Part of the loss of a layer's values from which a slot is worth its bytes and its time. Without
outliers it takes a fifth to a quarter of 64 channels' loss, a third of 16 channels'."""


def outlying_values(
    formats: Mapping[int, Format],
    tables: Mapping[int, Tables],
    observed: Mapping[int, Observed],
) -> dict[str, float]:
    """Where values without slots have outliers.

    Args:
        formats, tables: of the layers, by cache index.
        observed: calibration tokens.

    Returns:
        Cache index -> the part of the expected loss of its values that one slot more would take,
        of layers where that is at least :data:`WORTH`; JSON-able.
    """
    found = {}
    for index, spec in formats.items():
        if isinstance(spec, CodecSpec) and not spec.lossless and not spec.value_slots:
            made = tables[index]
            assert isinstance(made, LayerTables)
            part = _taken(spec, made, observed[index])
            if part >= WORTH:
                found[str(index)] = round(part, 3)
    return found


def _taken(spec: CodecSpec, tables: LayerTables, seen: Observed) -> float:
    """The part of the expected loss of values that one slot more would take."""
    keep = (seen.places >= spec.sink_tokens).nonzero()[:, 0]
    values = seen.values[:, keep].float()
    grad = None if seen.value_gradients is None else seen.value_gradients[:, keep].float()
    constants = {n: t for n, t in tables.tensors().items() if n.startswith("value_")}
    more = replace(spec, value_slots=spec.value_slots + 1)
    without, with_one = (
        float(expected_loss(values, grad, constants, form).sum()) for form in (spec, more)
    )
    return 1 - with_one / without if without > 0 else 0.0
