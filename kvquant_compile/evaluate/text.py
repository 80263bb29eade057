"""Evaluation text as token windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.errors import OptionError


def read_text(path: str | Path) -> str:
    """A text file's content, UTF-8; of a ``.jsonl`` file the documents' ``"text"`` (as C4 comes),
    joined by blank lines.

    Raises:
        OptionError: it cannot be read.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return content
        return "\n\n".join(json.loads(line)["text"] for line in content.split("\n") if line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"cannot read the text {path}",
            why=f"{type(error).__name__}: {error}",
            do='Pass a UTF-8 text file, or .jsonl with one {"text": ...} a line.',
        ) from error


def text_windows(text: str, tokenizer: Any, tokens: int, limit: int | None = None) -> list[Tensor]:
    """Non-overlapping windows, the tail dropped (the protocol of KVQuant, section 4).

    Args:
        text: tokenised once, as a whole, without special tokens.
        tokenizer: a transformers tokenizer.
        tokens: tokens per window, at least 2.
        limit: use only the first ``limit`` windows.

    Returns:
        int64 [1, tokens] each.

    Raises:
        OptionError: the text is shorter than one window, or the limit is below 1.
    """
    return token_windows(token_ids(text, tokenizer), tokens, limit)


def token_ids(text: str, tokenizer: Any) -> Tensor:
    """A whole text without special tokens, int64 [N]."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def token_windows(ids: Tensor, tokens: int, limit: int | None = None) -> list[Tensor]:
    """:func:`text_windows` of a text's ids int64 [N].

    Raises:
        OptionError: the text is shorter than a window, or no window is asked for.
    """
    if limit is not None and limit < 1:
        raise OptionError(
            f"a limit of {limit} windows", why="nothing would be scored", do="Pass 1 or more."
        )
    count = ids.numel() // tokens
    if tokens < 2 or count == 0:
        raise OptionError(
            f"windows of {tokens} tokens",
            why=f"the text has {ids.numel()} tokens, and a window needs at least 2",
            do="Use shorter windows or a longer text.",
        )
    rows = ids[: count * tokens].view(count, 1, tokens)
    return list(rows[:limit])
