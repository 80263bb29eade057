"""Perplexity and KL divergence of a cache codec against the full-precision model.

Every token of a window, itself included, is attended through the codec. A score that stayed the
same with a sabotaged cache would have measured nothing; the tests sabotage it.
"""

from __future__ import annotations

import contextlib
import math
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
        kl_error: standard error of ``kl`` over windows; None for a single window.
        loss_error: standard error, in nats, of the mean loss's difference from the original's on
            the same windows: most of what makes windows unlike is in both.
    """

    perplexity: float
    kl: float
    top1: float
    windows: int
    tokens: int
    kl_error: float | None = None
    loss_error: float | None = None


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
    found: dict[str, list[Tensor]] = {name: [] for name in ("original", *candidates)}
    with torch.inference_mode():
        for ids in track(windows):
            base = reference(ids)[0, :-1]
            targets = ids[0, 1:].to(base.device)
            found["original"].append(compare(base, base, targets))
            for name, logits in candidates.items():
                found[name].append(compare(base, logits(ids)[0, :-1], targets))
    tokens = sum(ids.shape[1] - 1 for ids in windows)
    stacked = {name: torch.stack(parts) for name, parts in found.items()}
    return {name: summary(rows, stacked["original"], tokens) for name, rows in stacked.items()}


def summary(windows: Tensor, original: Tensor, tokens: int) -> Score:
    """Means and standard errors of what :func:`compare` gave.

    Args:
        windows: float64 [W, 3], a codec's windows.
        original: float64 [W, 3], the original's, the same windows.
        tokens: scored in all of them.
    """
    loss, kl, top1 = windows.mean(0).tolist()
    errors = _standard_error(windows[:, 1]), _standard_error(windows[:, 0] - original[:, 0])
    return Score(math.exp(loss), kl, top1, len(windows), tokens, *errors)


def _standard_error(x: Tensor) -> float | None:
    return float(x.std() / len(x) ** 0.5) if len(x) > 1 else None


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
