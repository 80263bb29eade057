"""What calibration saw of a layer, beside the tables that it led to: small enough to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.observe import Observed
from kvquant_compile.codec.formats import Format, Tables
from kvquant_compile.codec.keys import dequantise_keys, quantise_keys
from kvquant_compile.codec.order import gather_index, key_order, reorder, restored, stored_tables
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit
from kvquant_compile.codec.values import dequantise_values, quantise_values
from kvquant_compile.evaluate.stored import KEYS, PARTS, round_trip
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.plan import LayerPlan

TOKENS = 2048  # most tokens looked at, spread over all
CELLS = 64
_BEYOND = 1.5  # histograms reach so far beyond the ends of a table
_QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)


@dataclass(frozen=True, eq=False)
class Normalised:
    """Activations in the units of a table.

    Attributes:
        edge: histograms span [-edge, edge].
        density: float [H, CELLS], integral 1 over what is inside.
        levels: float [H, L], the table.
        outliers: float [H, D], part of the tokens that keep this channel exactly.
    """

    edge: float
    density: Tensor
    levels: Tensor
    outliers: Tensor


@dataclass(frozen=True, eq=False)
class PartStatistics:
    """The keys or the values of one layer.

    Attributes:
        index: of the cache layer.
        part: "keys" or "values".
        quantiles: float [5, H, D]: least, 1 %, median, 99 %, greatest of every channel.
        error: mean squared error of the round trip over the mean square of the deviation from the
            channel's mean; None for lossless layers.
        loss: expected nats a token from the loss's gradients (to second order, heads and channels
            taken together); None where calibration took none.
        normalised: None for formats without a table per head.
    """

    index: int
    part: str
    quantiles: Tensor
    error: float | None
    loss: float | None
    normalised: Normalised | None


def layer_statistics(
    layers: Sequence[MatchedLayer], observed: Mapping[int, Observed], artifact: Artifact
) -> list[PartStatistics]:
    """Of every layer that calibration saw, keys before values."""
    found = []
    for layer in layers:
        plan = layer.plan
        if plan.index not in observed:
            continue
        spec, tables = artifact.specs[plan.index], artifact.tables.get(plan.index)
        for part in PARTS:
            x, grad = _sample(observed[plan.index], part, spec.sink_tokens)
            found.append(_statistics(plan, part, x, grad, spec, tables))
    return found


def _sample(seen: Observed, part: str, sinks: int) -> tuple[Tensor, Tensor | None]:
    """Some tokens [H, N, D], and their gradients; attention sinks are not in the pages."""
    x, grad = (
        (seen.keys, seen.key_gradients) if part == KEYS else (seen.values, seen.value_gradients)
    )
    kept = (seen.places >= sinks).nonzero()[:, 0]
    kept = kept[:: max(1, -(-len(kept) // TOKENS))]
    return x[:, kept].float(), None if grad is None else grad[:, kept].float()


def _statistics(
    plan: LayerPlan, part: str, x: Tensor, grad: Tensor | None, spec: Format, tables: Tables | None
) -> PartStatistics:
    levels = torch.tensor(_QUANTILES, device=x.device)
    quantiles = torch.quantile(x, levels, dim=1).cpu()
    if tables is None:
        return PartStatistics(plan.index, part, quantiles, None, None, None)
    normalised = None
    if isinstance(spec, CodecSpec) and isinstance(tables, LayerTables):
        read, normalised = _ours(plan, part, x, spec, tables)
    else:
        read = round_trip(plan, spec, tables, part, tail=False)(x[None])[0]
    error = read - x
    centred = (x - x.mean(1, keepdim=True)).square().mean()
    relative = float(error.square().mean() / centred.clamp_min(1e-30))
    loss = None if grad is None else _loss(error, grad)
    return PartStatistics(plan.index, part, quantiles, relative, loss, normalised)


def _loss(error: Tensor, grad: Tensor) -> float:
    """Half the expected squared product of error and gradient, taken as independent."""
    moment = grad.transpose(1, 2) @ grad / grad.shape[1]
    return float(0.5 * (error * (error @ moment)).mean(1).sum())


def _ours(
    plan: LayerPlan, part: str, x: Tensor, spec: CodecSpec, tables: LayerTables
) -> tuple[Tensor, Normalised]:
    """What is read back, in the model's channel order, and activations in table units."""
    tables = tables.to(x.device)
    if part != KEYS:
        codes = quantise_values(x[None], tables, spec)
        u = (x - tables.value_offset[:, None]) / tables.value_gain[:, None]
        scale = codes.scale[0].float().clamp_min(1e-7)[..., None]
        units = (u - codes.zero[0].float()[..., None]) / scale
        read = dequantise_values(codes, tables, spec)[0]
        place = codes.slot_index[0]
        return read, _normalised(units, tables.value_table, spec.value_bits, place, x.shape[-1])
    order = gather_index(key_order(plan.rope, plan.key_dim), plan.key_dim).to(x.device)
    stored = stored_tables(tables, order)
    keys = quantise_keys(reorder(x[None], order), stored, spec)
    read = dequantise_keys(keys, stored, spec)[0]
    place = keys.slot_index[0].long()
    if order.numel():
        read, place = restored(read, order, plan.key_dim), order[place]
    units = x / tables.key_scale[:, None] - tables.key_zero[:, None]
    if keys.token_scale is not None:
        units = units / keys.token_scale[0].float()[..., None]
    return read, _normalised(units, tables.key_table, spec.key_bits, place, plan.key_dim)


def _normalised(units: Tensor, table: Tensor, bits: int, place: Tensor, dim: int) -> Normalised:
    edge = _BEYOND * table_limit(bits)
    heads = units.shape[0]
    cells = ((units + edge) * (CELLS / (2 * edge))).floor().long()
    inside = ((cells >= 0) & (cells < CELLS)).flatten(1)
    counts = torch.zeros(heads, CELLS, device=units.device)
    counts.scatter_add_(1, cells.flatten(1).clamp(0, CELLS - 1), inside.float())
    density = counts / counts.sum(1, keepdim=True).clamp_min(1.0) * (CELLS / (2 * edge))
    kept = torch.zeros(heads, dim + 1, device=units.device)
    flat = place.flatten(1).long()
    kept.scatter_add_(1, flat, torch.ones_like(flat, dtype=kept.dtype))
    outliers = kept[:, :dim] / units.shape[1]
    return Normalised(edge, density.cpu(), table.float().cpu(), outliers.cpu())
