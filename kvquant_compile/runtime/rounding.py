"""How far a model's own rounding carries: what two correct evaluations may differ by.

In half precision a model whose experts are chosen by close scores is not a continuous function:
a rounding error of one bit sends tokens to other experts. Two runs that differ by no more than the
rounding of the embedded tokens show how far apart correct results are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_RUNS = 4


def rounding_floor(embedding: nn.Module, run: Callable[[], Sequence[Tensor]]) -> float:
    """The largest relative error that one unit of rounding of the embeddings makes.

    Args:
        embedding: the module whose output is disturbed, by half a unit in its last place.
        run: evaluates the model on fixed tokens; real tokens' outputs [N, width], one per step.

    Returns:
        Norm of the difference over the norm, of the worst step of a few runs.
    """
    plain = run()
    worst = 0.0
    for seed in range(_RUNS):
        hook = embedding.register_forward_hook(_Noise(seed))
        try:
            disturbed = run()
        finally:
            hook.remove()
        for a, b in zip(plain, disturbed, strict=True):
            worst = max(worst, float((a - b).float().norm() / a.float().norm()))
    return worst


class _Noise:
    """A forward hook that changes every element of an output by at most one rounding."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=self.generator).to(output.device) - 0.5
        return (output.float() * (1 + torch.finfo(output.dtype).eps * noise)).to(output.dtype)
