"""How far a model's own rounding carries: what two correct evaluations may differ by.

In half precision a model whose experts are chosen by close scores is not a continuous function:
a rounding error of one bit sends tokens to other experts. Two runs that differ by no more than the
rounding of the embedded tokens show how far apart correct results are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_RUNS = 4
# Times the model's own rounding that a result may be off; what is beyond MOST tells nothing.
_TIMES, _MOST = 2.0, 0.5

Disturb = Callable[[Tensor], Tensor]


def widened_limit(
    limit: float, error: float, dtype: torch.dtype, run: Callable[[Disturb], Sequence[Tensor]]
) -> float:
    """The limit of an error, raised to what the model's own rounding explains.

    Args:
        limit: what rounding usually causes.
        error: what was found; the model is only run again where it is beyond the limit.
        dtype: of the model; limits of single precision stay.
        run: evaluates the original on fixed tokens after passing the embedded ones through a
            function; gives the real tokens' outputs [N, width], one per step.
    """
    if dtype.itemsize != 2 or not limit < error < _MOST:
        return limit
    return max(limit, min(_MOST, _TIMES * rounding_floor(run)))


def rounding_floor(run: Callable[[Disturb], Sequence[Tensor]]) -> float:
    """The largest relative error (of norms) that one rounding of the embeddings makes in a step;
    ``run`` as of :func:`widened_limit`."""
    plain = run(lambda embedded: embedded)
    worst = 0.0
    for seed in range(_RUNS):
        for a, b in zip(plain, run(_Noise(seed)), strict=True):
            worst = max(worst, float((a - b).float().norm() / a.float().norm()))
    return worst


class _Noise:
    """Changes every element by at most one unit in its last place."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=self.generator).to(x.device) * 2 - 1
        return (x.float() * (1 + torch.finfo(x.dtype).eps * noise)).to(x.dtype)
