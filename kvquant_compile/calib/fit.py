"""Fit the constants of one layer from its keys, values and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant_compile.calib.fit_keys import fit_keys
from kvquant_compile.calib.fit_published import fit_published
from kvquant_compile.calib.fit_values import fit_values
from kvquant_compile.calib.observe import Observed
from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec.algebra.base import Sample
from kvquant_compile.codec.algebra.recipe import Recipe, RecipeTables
from kvquant_compile.codec.order import gather_index, key_order
from kvquant_compile.codec.spec import CodecSpec, LayerTables
from kvquant_compile.errors import CalibrationError
from kvquant_compile.plan import LayerPlan, RopeSpec

MIN_TOKENS = 16
_PER_CHANNEL = ("key_scale", "key_zero", "key_weight")


def fit_layer(
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    spec: CodecSpec,
    settings: FitSettings | None = None,
    ignore: Tensor | None = None,
    rope: RopeSpec | None = None,
) -> LayerTables:
    """Fit all constants of a layer. Deterministic.

    Args:
        k, v: float [H, N, D], keys before RoPE and values of the calibration tokens.
        gk, gv: gradients of the loss with respect to them, or None for unweighted errors.
        spec: the layer's format.
        settings: ingredients; the defaults when None.
        ignore: bool [N], tokens to leave out (attention sinks, padding).
        rope: the keys' rotation, which settles the order that pages store their channels in.

    Raises:
        CalibrationError: too few tokens, or values that are not finite.
    """
    settings = settings or FitSettings()
    keep = _kept(k, ignore)
    keys, values = k[:, keep].float(), v[:, keep].float()
    key_grad, value_grad = (None if g is None else g[:, keep].float() for g in (gk, gv))
    _check_finite(keys, values)
    if settings.published:
        return fit_published(keys, values, key_grad, value_grad, spec)
    key_part = _fit_keys_in_order(keys, key_grad, spec, settings, rope)
    return LayerTables(**key_part, **fit_values(values, value_grad, spec, settings))


def _fit_keys_in_order(
    keys: Tensor,
    grad: Tensor | None,
    spec: CodecSpec,
    settings: FitSettings,
    rope: RopeSpec | None,
) -> dict[str, Tensor]:
    """Key constants fitted in pair order; what is per channel goes back to the model's order."""
    dim = keys.shape[-1]
    order = key_order(rope, dim)
    real = torch.tensor([channel for channel in order if channel >= 0], device=keys.device)
    place = iter(range(dim))
    padding = gather_index([-1 if channel < 0 else next(place) for channel in order], dim)
    grad = None if grad is None else grad[..., real]
    fitted = fit_keys(keys[..., real], grad, spec, settings, padding.to(keys.device))
    back = real.argsort()
    return fitted | {name: fitted[name][:, back] for name in _PER_CHANNEL}


def fit_recipe(
    recipe: Recipe, plan: LayerPlan, seen: Observed | None, seed: int, device: torch.device
) -> RecipeTables:
    """Fit the constants of a recipe for one layer. Deterministic for a seed.

    Args:
        recipe: the layer's format.
        plan: the layer; keys are as it stores them.
        seen: calibration tokens; None where the recipe needs none.
        seed: of what the recipe draws.
        device: of the constants.

    Raises:
        CalibrationError: too few tokens, or values that are not finite.
    """
    if seen is None:
        keys = torch.empty(plan.kv_heads, 0, plan.key_dim, device=device)
        values = torch.empty(plan.kv_heads, 0, plan.value_dim, device=device)
    else:
        keep = _kept(seen.keys, seen.places < recipe.sinks)
        keys, values = seen.keys[:, keep].float(), seen.values[:, keep].float()
        _check_finite(keys, values)
    rope = plan.rope or plan.kept
    pairs = () if rope is None else (rope.in_pairs if plan.rope else rope.out_pairs)
    return recipe.fit(Sample(keys, pairs, seed), Sample(values, (), seed))


def _kept(k: Tensor, ignore: Tensor | None) -> Tensor:
    tokens = k.shape[1]
    keep = torch.arange(tokens, device=k.device)
    if ignore is not None:
        keep = keep[~ignore]
    if len(keep) < MIN_TOKENS:
        raise CalibrationError(
            "cannot fit a layer's tables",
            why=f"only {len(keep)} calibration tokens are left, {MIN_TOKENS} are needed",
            do="Calibrate with more or longer texts.",
        )
    return keep


def _check_finite(*tensors: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise CalibrationError(
            "cannot fit a layer's tables",
            why="its keys or values hold NaN or infinity on the calibration texts",
            do="Check the model in this dtype, or calibrate in float32.",
        )
