"""What an error in a key or value costs, from gradients of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant_compile.calib.settings import FitSettings
from kvquant_compile.codec.feedback import STAGE_CHANNELS, UNITS


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Separable weights of squared errors.

    Attributes:
        channel: float32 [H, D], mean 1.
        token: float32 [H, N], mean 1.
    """

    channel: Tensor
    token: Tensor


def sensitivity(x: Tensor, grad: Tensor | None, settings: FitSettings) -> Sensitivity:
    """Weights from gradients [H, N, D] with respect to ``x`` [H, N, D]; ones without them.

    A single token's squared gradient is far too noisy to weigh by element, so the Fisher
    information is averaged into a channel factor and a token factor.
    """
    if grad is None or not settings.sensitivity:
        heads, tokens, dim = x.shape
        return Sensitivity(x.new_ones(heads, dim), x.new_ones(heads, tokens))
    return Sensitivity(
        _mean_one(grad.square().mean(1).pow(settings.channel_power)),
        _mean_one(grad.norm(dim=-1).pow(settings.token_power)),
    )


def feedback_matrix(grad: Tensor, unit: Tensor, damping: float) -> Tensor:
    """How the error of a channel should move the later ones.

    With M the gradients' second moment in coding units and U the upper Cholesky factor of its
    inverse, the error of a stage S is best compensated on the later channels R by
    ``-e U_SS^-1 U_SR`` (GPTQ, arXiv 2210.17323, block by block).

    Args:
        grad: float32 [H, N, D].
        unit: float32 [H, D], the size of one coding unit in every channel.
        damping: part of the mean diagonal added to the diagonal.

    Returns:
        int8 [H, D, D] in units of 1 / 64, strictly upper block triangular.
    """
    dim = grad.shape[-1]
    moment = (grad.transpose(1, 2) @ grad).double() / grad.shape[1]
    moment = moment * unit.double()[:, :, None] * unit.double()[:, None, :]
    ridge = damping * moment.diagonal(dim1=1, dim2=2).mean(1) + 1e-300
    moment = moment + ridge[:, None, None] * torch.eye(dim, device=grad.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper = torch.linalg.cholesky(inverse, upper=True)
    matrix = torch.zeros_like(moment)
    for start in range(0, dim - STAGE_CHANNELS, STAGE_CHANNELS):
        stop = start + STAGE_CHANNELS
        rows = upper[:, start:stop]
        solved = torch.linalg.solve_triangular(rows[..., start:stop], rows[..., stop:], upper=True)
        matrix[:, start:stop, stop:] = -solved
    return (matrix * UNITS).round().clamp(-127, 127).to(torch.int8)


def _mean_one(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return torch.where(mean > 0, x / mean.clamp_min(1e-30), torch.ones_like(x))
