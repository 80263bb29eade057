"""Assertions about maps of channels: that they invert, and that RoPE may pass them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvquant_compile.codec.algebra import Sample, Stage
from kvquant_compile.testing.tensors import half_pairs, rotate

Pairs = tuple[tuple[int, int], ...]


def assert_inverse(stage: Stage, x: Tensor, *, tolerance: float = 1e-4) -> None:
    """``inverse`` undoes ``forward``.

    Args:
        stage: fitted to ``x``.
        x: finite tokens [B, H, N, D], N a multiple of ``stage.tokens``.
        tolerance: largest error over the largest magnitude of its token's unit.

    Raises:
        AssertionError: it does not.
    """
    units = x.float().unflatten(2, (-1, stage.tokens))
    constants = stage.fit(_sample(x, ()))
    y, parts = stage.forward(units, constants)
    back = stage.inverse(y, parts, constants)
    size = units.abs().amax((1, 3, 4), keepdim=True).clamp_min(1e-30)
    error = float(((back - units).abs() / size).max())
    if not error <= tolerance:
        raise AssertionError(f"{stage}: what is undone is off by {error:.3g} > {tolerance:g}")


def assert_rope_commutes(
    change: Stage | Callable[[Tensor], Tensor],
    x: Tensor,
    pairs: Pairs | None = None,
    *,
    tolerance: float = 1e-5,
) -> None:
    """A map may pass RoPE: rotating what it gives is what it gives for rotated keys.

    Such a map of keys can be folded into the projections, or moved to the query.

    Args:
        change: a stage (fitted to ``x`` and the pairs), or a function of tokens [B, H, N, D].
        x: keys [B, H, N, D].
        pairs: channels that turn together; halves if None.
        tolerance: largest error over the largest magnitude.

    Raises:
        AssertionError: it does not commute.
    """
    pairs = half_pairs(x.shape[-1]) if pairs is None else pairs
    run = _run(change, x, pairs) if isinstance(change, Stage) else change
    first, second = rotate(run(x), pairs), run(rotate(x, pairs))
    error = float((first - second).abs().max() / first.abs().max().clamp_min(1e-30))
    if not error <= tolerance:
        raise AssertionError(f"{change}: does not commute with RoPE, off by {error:.3g}")


def _run(stage: Stage, x: Tensor, pairs: Pairs) -> Callable[[Tensor], Tensor]:
    constants = stage.fit(_sample(x, pairs))

    def run(tokens: Tensor) -> Tensor:
        units = tokens.float().unflatten(2, (-1, stage.tokens))
        return stage.forward(units, constants)[0].flatten(2, 3)

    return run


def _sample(x: Tensor, pairs: Pairs) -> Sample:
    return Sample(x.float().transpose(0, 1).flatten(1, 2), pairs)
