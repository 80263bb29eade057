"""Calibration tokens from whatever the user has: nothing, texts, tensors, or a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvquant_compile.calib.observe import predicted
from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.run import Store, run_marked
from kvquant_compile.errors import CalibrationError


@dataclass(frozen=True)
class WindowSettings:
    """How calibration text is cut.

    Attributes:
        windows: number of windows used at most.
        tokens: tokens per window.
        seed: choice of windows, and of sampled sequences.
    """

    windows: int = 16
    tokens: int = 2048
    seed: int = 0


def calibration_windows(
    data: Any, tokenizer: Any, captured: Captured, settings: WindowSettings
) -> list[Tensor]:
    """Token windows int64 [1, S] from the user's data.

    Args:
        data: a string, strings, token tensors [S] or [B, S], or an iterable (DataLoader) of any
            of these or of mappings with ``input_ids``.
        tokenizer: needed for strings.
        captured: the model (its vocabulary bounds the ids).
        settings: number and size of windows.

    Raises:
        CalibrationError: nothing usable in it.
    """
    if isinstance(data, str | Tensor):
        data = [data]
    if not isinstance(data, Iterable):
        raise _unusable(f"it is a {type(data).__name__}")
    pieces = [ids for item in data for ids in _token_rows(item, tokenizer)]
    if not pieces:
        raise _unusable("it is empty")
    limit = vocabulary(captured.model)
    for extreme in (max(int(p.max()) for p in pieces), min(int(p.min()) for p in pieces)):
        if extreme < 0 or (limit and extreme >= limit):
            raise _unusable(f"token id {extreme} is outside the model's vocabulary of {limit}")
    return _cut(pieces, settings)


def _token_rows(item: Any, tokenizer: Any) -> list[Tensor]:
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise _unusable("an item is a mapping without input_ids")
        item = item["input_ids"]
    if isinstance(item, str):
        if tokenizer is None:
            raise CalibrationError(
                "calibration text cannot be tokenised",
                why="strings were given without a tokenizer",
                do="Pass tokenizer=AutoTokenizer.from_pretrained(...), or token tensors.",
            )
        item = tokenizer(item, add_special_tokens=False)["input_ids"]
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unusable(f"an item is a {type(item).__name__}") from error
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise _unusable(f"its tensors hold {ids.dtype}, not token ids")
    if ids.ndim == 0:
        raise _unusable("an item is a single number, not a sequence of token ids")
    return list(ids.long().cpu().reshape(-1, ids.shape[-1])) if ids.numel() else []


def _cut(pieces: list[Tensor], settings: WindowSettings) -> list[Tensor]:
    """Windows spread evenly over everything that was given, long pieces cut, short ones kept."""
    windows = []
    for piece in pieces:
        for start in range(0, piece.numel(), settings.tokens):
            part = piece[start : start + settings.tokens]
            if part.numel() >= min(16, settings.tokens):
                windows.append(part[None])
    if not windows:
        raise _unusable("no piece has 16 tokens")
    full = [w for w in windows if w.shape[1] == settings.tokens]
    chosen = full if len(full) >= min(settings.windows, len(windows)) // 2 and full else windows
    if len(chosen) > settings.windows:
        generator = torch.Generator().manual_seed(settings.seed)
        keep = torch.randperm(len(chosen), generator=generator)[: settings.windows]
        chosen = [chosen[int(i)] for i in keep.sort().values]
    return chosen


def sample_windows(captured: Captured, settings: WindowSettings, batch: int = 16) -> list[Tensor]:
    """Sequences that the model itself samples, int64 [1, S] each; no data needed.

    Transformers models sample through their own ``generate`` at temperature 1 from the
    beginning-of-sequence token; functional ones through their forward.

    Raises:
        CalibrationError: the model's vocabulary is unknown.
        UnsupportedModelError: it predicts no tokens.
    """
    size = vocabulary(captured.model)
    if not size:
        raise CalibrationError(
            "the model cannot sample its own calibration text",
            why="its vocabulary size is not known",
            do="Pass calibration= with token tensors.",
        )
    windows: list[Tensor] = []
    devices = [captured.device] if captured.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(settings.seed)
        while len(windows) < settings.windows:
            count = min(batch, settings.windows - len(windows))
            start = _first_tokens(captured, count, size)
            windows += list(_sample(captured, start, settings.tokens).cpu().split(1))
    return windows


def _first_tokens(captured: Captured, count: int, vocabulary: int) -> Tensor:
    config = getattr(captured.model, "config", None)
    bos = getattr(config, "bos_token_id", None)
    if isinstance(bos, int) and 0 <= bos < vocabulary:
        return torch.full((count, 1), bos, device=captured.device)
    return torch.randint(vocabulary, (count, 1), device=captured.device)


def _sample(captured: Captured, ids: Tensor, tokens: int) -> Tensor:
    """Extend ids [B, 1] to [B, tokens] by sampling; hand-written decoders through their graph."""
    model: Any = captured.model
    past: Any = None
    if captured.decoder is None:
        assert captured.caches is not None
        past = captured.caches.new()
    else:
        with captured.decoder.undisturbed():
            tokens = captured.decoder.longest(tokens)
    store: Store = {}
    step = ids
    while ids.shape[1] < tokens:
        if captured.decoder is None:
            result = model(input_ids=step, past_key_values=past, use_cache=True)
            logits = predicted(model, result)
        else:
            cached = ids.shape[1] - step.shape[1]
            logits = run_marked(captured.graph_module, store, step, cached)
        step = drawn(torch.softmax(logits[:, -1].float(), -1))
        ids = torch.cat([ids, step], 1)
    if captured.caches is not None:
        captured.caches.forget()
    return ids


def drawn(chances: Tensor) -> Tensor:
    """A token of every row [B, V], int64 [B, 1].

    On a CPU by inversion: ``torch.multinomial`` draws a number for every token of the vocabulary
    there, which takes many times as long.
    """
    if chances.device.type != "cpu":
        return torch.multinomial(chances, 1)
    below = chances.cumsum(-1)
    at = torch.rand(len(chances), 1) * below[:, -1:]
    return torch.searchsorted(below, at, right=True).clamp(max=chances.shape[1] - 1)


def vocabulary(model: nn.Module) -> int:
    """Rows of the model's input embedding; 0 when it has none."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        embeddings = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return int(embeddings.weight.shape[0]) if embeddings is not None else 0


def _unusable(why: str) -> CalibrationError:
    return CalibrationError(
        "the calibration data cannot be used",
        why=why,
        do="Pass text with tokenizer=, token tensors, an iterable of either, or None.",
    )
