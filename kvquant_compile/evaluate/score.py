"""Perplexity and KL divergence of a cache codec against the full-precision model.

Every token of a window, itself included, is attended through the codec. A score that stayed the
same with a sabotaged cache would have measured nothing; the tests sabotage it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvquant_compile.runtime.installed import installed

Logits = Callable[[Tensor], Tensor]
_ROWS = 512


@dataclass(frozen=True)
class Score:
    """Mean over windows.

    Attributes:
        perplexity: exp of the mean over windows of the mean next-token loss.
        kl: mean over tokens of KL(original || codec), nats; 0 for the original.
        top1: share of tokens whose most likely successor is the original's.
        windows, tokens: how much was scored.
    """

    perplexity: float
    kl: float
    top1: float
    windows: int
    tokens: int


@contextlib.contextmanager
def quantised_attention(model: nn.Module) -> Iterator[None]:
    """Every forward of an optimised model attends to quantised keys and values only.

    Raises:
        OptionError: the model is not optimised.
    """
    state = installed(model)
    before = state.attend_quantized
    state.attend_quantized = True
    try:
        yield
    finally:
        state.attend_quantized = before


def score(
    reference: Logits,
    candidates: dict[str, Logits],
    windows: Sequence[Tensor],
    track: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> dict[str, Score]:
    """Score several codecs on the same windows, the reference being run once for all.

    Args:
        reference: logits of the full-precision model.
        candidates: name -> logits of a codec.
        windows: int64 [1, S] each.
        track: iterates over the windows; a progress bar's.

    Returns:
        name -> score; the reference's own under ``"original"``.
    """
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("original", *candidates)}
    with torch.inference_mode():
        for ids in track(windows):
            base = reference(ids)[0, :-1]
            targets = ids[0, 1:].to(base.device)
            sums["original"] += compare(base, base, targets)
            for name, logits in candidates.items():
                sums[name] += compare(base, logits(ids)[0, :-1], targets)
    tokens = sum(ids.shape[1] - 1 for ids in windows)
    return {name: _mean(total, len(windows), tokens) for name, total in sums.items()}


def compare(base: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """(mean loss, mean KL, share of equal argmax) of one window, float64 [3]."""
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, targets.numel(), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = base[rows].float().log_softmax(-1), other[rows].float().log_softmax(-1)
        loss = F.nll_loss(q, targets[rows], reduction="sum")
        kl = F.kl_div(q, p, log_target=True, reduction="sum")
        same = (p.argmax(-1) == q.argmax(-1)).sum()
        total += torch.tensor([float(loss), float(kl), float(same)], dtype=torch.float64)
    return total / targets.numel()


def mean_kl(base: Tensor, other: Tensor) -> float:
    """KL(base || other) of the distributions of logits [S, vocab], nats, mean over tokens."""
    total = 0.0
    for start in range(0, base.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = base[rows].float().log_softmax(-1), other[rows].float().log_softmax(-1)
        total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
    return total / base.shape[0]


def _mean(total: Tensor, windows: int, tokens: int) -> Score:
    loss, kl, top1 = (float(x) / windows for x in total)
    return Score(float(torch.tensor(loss).exp()), kl, top1, windows, tokens)
