"""Needle in a haystack: does a fact far back in the cache still come out, by its depth.

A sentence with a secret number is put into a text at a depth, and the sentence is begun again at
the end. What counts is how the model rates the number's tokens then, all given: a small model that
copies shows the same effect as a large one that answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate.score import Logits

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
REPEATS = 3
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Quito", "Vienna")
SENTENCE = " The secret number of {city} is"


@dataclass(frozen=True, eq=False)
class Case:
    """One haystack.

    Attributes:
        depth: where the needle lies, 0 for the beginning and 1 for the end.
        ids: int64 [1, S], ending with the answer.
        answer: how many tokens it has.
    """

    depth: float
    ids: Tensor
    answer: int


def needle_cases(
    text: Tensor, tokenizer: Any, window: int, depths: Sequence[float] = DEPTHS, seed: int = 0
) -> list[Case]:
    """Haystacks of ``window`` tokens, several for each depth.

    Args:
        text: int64 [N], the hay.
        tokenizer: of the model.
        window: tokens of a haystack, needle and question included.
        depths: 0 to 1.
        seed: of the numbers.

    Raises:
        OptionError: the text or the window is too short.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for repeat in range(REPEATS):
        digits = torch.randint(10, (5,), generator=generator).tolist()
        city = CITIES[(repeat + seed) % len(CITIES)]
        question = _tokens(tokenizer, SENTENCE.format(city=city))
        answer = _tokens(tokenizer, " " + "".join(map(str, digits)))
        needle = torch.cat([question, answer, _tokens(tokenizer, ".")])
        hay = window - len(needle) - len(question) - len(answer)
        start = repeat * hay
        if hay < 1 or start + hay > len(text):
            raise OptionError(
                f"haystacks of {window} tokens",
                why=f"{REPEATS} of them are made of a text of {len(text)} tokens",
                do="Use another window, or a longer text.",
            )
        straw = text[start : start + hay]
        for depth in depths:
            at = round(depth * hay)
            ids = torch.cat([straw[:at], needle, straw[at:], question, answer])
            cases.append(Case(depth, ids[None], len(answer)))
    return cases


def needle_score(logits: Logits, cases: Iterable[Case]) -> list[dict[str, float]]:
    """Mean accuracy and loss of the answer's tokens, by depth."""
    found: dict[float, list[tuple[float, float]]] = {}
    with torch.inference_mode():
        for case in cases:
            rows = logits(case.ids)[0, -case.answer - 1 : -1].float().cpu()
            answer = case.ids[0, -case.answer :]
            right = (rows.argmax(-1) == answer).float().mean()
            found.setdefault(case.depth, []).append(
                (float(right), float(F.cross_entropy(rows, answer)))
            )
    return [
        {
            "depth": depth,
            "accuracy": sum(a for a, _ in scores) / len(scores),
            "loss": sum(b for _, b in scores) / len(scores),
        }
        for depth, scores in sorted(found.items())
    ]


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
