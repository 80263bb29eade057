"""Key constants: channel scales and zeros, tables, token-scale constants.

The fit alternates, in float, between codes, per-channel least squares for scale and offset, and
k-means for the table; then everything is rounded to what the format stores and the remaining
shrinkage is undone with the real codec.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvquant_compile.calib.levels import even_levels, normal_levels
from kvquant_compile.calib.nuq import weighted_kmeans
from kvquant_compile.calib.sensitivity import Sensitivity, feedback_matrix, sensitivity
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec.keys import dequantise_keys, quantise_keys
from kvquant_compile.codec.nuq import levels_of, nearest_codes
from kvquant_compile.codec.order import reorder, stored_tables
from kvquant_compile.codec.slots import FLOAT16_MAX, largest
from kvquant_compile.codec.spec import CodecSpec, LayerTables, table_limit

ZERO_LIMIT = 1024
SCALE_MIN = 2.0**-24
STRETCH_STEPS = 3
_START_DEVIATIONS = 2.5
_HISTOGRAM_LIMIT = 8.0


class _KeyFit:
    """State of the alternation: k ~ scale (a level + 0) + offset, levels in deviations."""

    def __init__(
        self,
        k: Tensor,
        weights: Sensitivity,
        spec: CodecSpec,
        settings: FitSettings,
        padding: Tensor,
    ) -> None:
        self.k, self.weights, self.spec, self.settings = k, weights, spec, settings
        self.padding = padding
        self.offset = k.mean(1)
        self.scale = (k - self.offset[:, None]).square().mean(1).sqrt()
        floor = 1e-6 * self.scale.amax(1, keepdim=True) + 1e-7
        self.scale = torch.maximum(self.scale, floor)
        heads, count = k.shape[0], 2**spec.key_bits
        self.nuq = settings.key_nuq and spec.key_bits <= 4
        start = normal_levels(count) if self.nuq else even_levels(count, _START_DEVIATIONS)
        self.levels = start.to(k.device).repeat(heads, 1)

    def error_weight(self) -> Tensor:
        """Cost [H, D] of a squared error in normalised units, before the token's factor."""
        weight = self.weights.channel
        if self.settings.scale_squared:
            weight = weight * self.scale.square()
        return weight / weight.mean(1, keepdim=True)

    def normalised(self) -> tuple[Tensor, Tensor]:
        """Normalised keys [H, N, D] and token scales [H, N, 1]."""
        x = (self.k - self.offset[:, None]) / self.scale[:, None]
        if not self.spec.key_token_scale:
            return x, torch.ones_like(x[..., :1])
        weight = self.error_weight()[:, None]
        energy = x.square() * weight
        energy.scatter_(-1, largest(energy, self.spec.key_slots).long(), 0.0)
        return x, (energy.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)).sqrt() + 1e-6

    def step(self) -> None:
        """Codes, then channel scales and offsets, then the table."""
        x, a = self.normalised()
        level = levels_of(nearest_codes(x[None] / a, self.levels), self.levels)[0] * a
        error = (x - level).square_().mul_(self.error_weight()[:, None])
        keep = self.weights.token[..., None].expand_as(x).clone()
        keep.scatter_(-1, largest(error, self.spec.key_slots).long(), 0.0)
        self._fit_channels(level, keep)
        if self.nuq:
            x, a = self.normalised()
            weight = keep * self.error_weight()[:, None] * a.square()
            flat = (x / a).flatten(1).clamp(-_HISTOGRAM_LIMIT, _HISTOGRAM_LIMIT)
            count = self.levels.shape[1]
            self.levels = weighted_kmeans(flat, weight.flatten(1), count, _HISTOGRAM_LIMIT).float()

    def _fit_channels(self, level: Tensor, keep: Tensor) -> None:
        """Weighted regression of the keys on their levels, channel by channel."""
        mass = keep.sum(1).clamp_min(1e-9)
        level_mean = (level * keep).sum(1) / mass
        key_mean = (self.k * keep).sum(1) / mass
        centred = (level - level_mean[:, None]).mul_(keep)
        spread = (centred * level).sum(1)
        slope = (centred * self.k).sum(1) / spread.clamp_min(1e-9)
        usable = (spread > 1e-9) & (slope > 0.1 * self.scale)
        self.scale = torch.where(usable, slope, self.scale)
        self.offset = key_mean - self.scale * level_mean

    def rounded(self) -> dict[str, Tensor]:
        """The constants in the format's units, by field of ``LayerTables``."""
        limit = table_limit(self.spec.key_bits)
        unit = limit / self.levels.abs().amax(1, keepdim=True).clamp_min(1e-6)
        return {
            "key_table": (self.levels * unit).round().to(torch.int8),
            "key_weight": self.weights.channel,
            "key_norm": unit[:, 0],
            **grid(self.scale / unit, self.offset),
        }


def fit_keys(
    k: Tensor, grad: Tensor | None, spec: CodecSpec, settings: FitSettings, padding: Tensor
) -> dict[str, Tensor]:
    """Key constants, by field of ``LayerTables``, from float32 keys and gradients [H, N, D].

    Channels are in pair order without its padding, which ``padding`` (see ``codec.order.reorder``)
    puts in.
    """
    weights = sensitivity(k, grad, settings)
    stride = max(1, -(-k.shape[1] // settings.fit_tokens))
    sample = Sensitivity(weights.channel, weights.token[:, ::stride])
    fit = _KeyFit(k[:, ::stride].contiguous(), sample, spec, settings, padding)
    for _ in range(settings.refine):
        fit.step()
    constants = fit.rounded()
    constants["key_stretch"] = torch.ones_like(constants["key_norm"])
    if settings.key_feedback and grad is not None:
        stored_grad, unit = (reorder(x, padding) for x in (grad, constants["key_scale"]))
        constants["key_feedback"] = feedback_matrix(stored_grad, unit, settings.damping)
    return _partly_stretched(fit, constants, settings.stretch)


def grid(scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """Scales and zeros on the format's grid, of scales and offsets float32 [H, D]: float16 values
    and integers of magnitude at most ``ZERO_LIMIT``, both as float32."""
    scale = torch.maximum(scale, offset.abs() / ZERO_LIMIT).clamp(SCALE_MIN, FLOAT16_MAX)
    scale = scale.half().float()
    zero = (offset / scale).round().clamp(-ZERO_LIMIT, ZERO_LIMIT)
    return {"key_scale": scale, "key_zero": zero}


def _partly_stretched(fit: _KeyFit, constants: dict[str, Tensor], part: float) -> dict[str, Tensor]:
    """Undo ``part`` of the shrinkage of keys (Q-Norm): between the given constants and slope 1."""
    if part == 0:
        return constants
    full = constants
    for _ in range(STRETCH_STEPS):
        full = _stretched(fit, full)
    offsets = [c["key_scale"] * c["key_zero"] for c in (constants, full)]
    offset = offsets[0] + part * (offsets[1] - offsets[0])
    powers = {
        name: constants[name] ** (1 - part) * full[name] ** part
        for name in ("key_scale", "key_stretch")
    }
    stretch = powers["key_stretch"]
    return {**constants, "key_stretch": stretch, **grid(powers["key_scale"], offset)}


def _stretched(fit: _KeyFit, constants: dict[str, Tensor]) -> dict[str, Tensor]:
    """Divide scales by the slope of the stored keys regressed on the true ones.

    Token scales are fitted to the token and would undo a common factor, so that one goes into
    ``key_stretch``.
    """
    stored = _dense(fit, constants)
    centred = fit.k - fit.k.mean(1, keepdim=True)
    energy = centred.square().sum(1)
    slope = (centred * stored).sum(1) / energy.clamp_min(1e-12)
    slope = torch.where(energy > 1e-12, slope.clamp(0.5, 1.5), torch.ones_like(slope))
    stretch = constants["key_stretch"]
    if fit.spec.key_token_scale:
        common = (slope * fit.error_weight()).mean(1)
        stretch = stretch / common
        slope = slope / common[:, None]
    scale = constants["key_scale"] / slope
    middle = (stored / constants["key_scale"][:, None] - constants["key_zero"][:, None]).mean(1)
    offset = fit.k.mean(1) - scale * middle
    return {**constants, "key_stretch": stretch, **grid(scale, offset)}


def _dense(fit: _KeyFit, constants: dict[str, Tensor]) -> Tensor:
    """The sample's keys [H, N, D] as their codes alone would give them back."""
    none = torch.empty(0, device=fit.k.device)
    tables = LayerTables(**constants, value_table=none, value_gain=none, value_offset=none)
    tables = stored_tables(tables, fit.padding)
    keys = quantise_keys(reorder(fit.k[None], fit.padding), tables, fit.spec)
    keys = replace(keys, slot_residual=torch.zeros_like(keys.slot_residual))
    stored = dequantise_keys(keys, tables, fit.spec)[0]
    return stored if fit.padding.numel() == 0 else stored[..., fit.padding < fit.k.shape[-1]]
