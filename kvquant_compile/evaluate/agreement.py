"""Long greedy agreement: for how many tokens a codec chooses what the original chooses.

The original continues a prompt greedily; the codec then reads prompt and continuation in one pass,
every token from its cache. Up to the first token that it would have chosen otherwise its inputs
are those of a generation of its own, so that the place is that generation's as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.evaluate.score import Logits

PROMPTS = 4


def continuations(model: Any, prompts: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Prompts int64 [1, P] with ``tokens`` greedy tokens of the model behind them, [1, P + tokens].

    An end-of-sequence token does not end them.
    """
    with torch.no_grad():
        return [
            model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=[],
                pad_token_id=0,
            ).cpu()
            for ids in prompts
        ]


def agreement(logits: Logits, runs: Sequence[Tensor], tokens: int) -> list[dict[str, float]]:
    """How far a codec goes with the original.

    Args:
        logits: the codec's.
        runs: what :func:`continuations` gave.
        tokens: of them generated.

    Returns:
        By run: ``same``, tokens before the first other one, and ``share`` of all tokens that are
        chosen alike when the original's are given.
    """
    found = []
    with torch.inference_mode():
        for ids in runs:
            chosen = logits(ids)[0, -tokens - 1 : -1].argmax(-1).cpu()
            alike = chosen == ids[0, -tokens:]
            same = int(alike.long().cumprod(0).sum())
            found.append({"same": same, "share": float(alike.float().mean())})
    return found
