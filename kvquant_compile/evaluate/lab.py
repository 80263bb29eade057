"""The laboratory: points, windows and measures of one model, resumed from its results.

Nothing is calibrated or run for what the results hold already.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.evaluate.agreement import PROMPTS, agreement, continuations
from kvquant_compile.evaluate.fake import fake_logits
from kvquant_compile.evaluate.fits import Fits
from kvquant_compile.evaluate.layer_errors import layer_errors
from kvquant_compile.evaluate.needle import needle_cases, needle_score
from kvquant_compile.evaluate.points import ORIGINAL, SIMULATED, Point
from kvquant_compile.evaluate.results import Results
from kvquant_compile.evaluate.run import Prepared
from kvquant_compile.evaluate.score import Logits, compare, summary
from kvquant_compile.evaluate.source import Source, digest
from kvquant_compile.evaluate.table import Row, mean_bits, original_logits, program_logits
from kvquant_compile.evaluate.text import token_windows
from kvquant_compile.progress import Progress
from kvquant_compile.runtime.program import Program

ORIGINAL_POINT = Point(ORIGINAL)
Size = Callable[[], tuple[float, int | None]]
"""Effective bits and bytes of the cache after a pass."""


class Lab:
    """One model, one text.

    Args:
        model: a transformers causal LM; stays as it is.
        tokenizer: its tokenizer.
        text: what is scored.
        window, limit: tokens of a window, and how many windows; None for all.
        calibration: a text, or None for the model's own.
        options: of calibration.
        results: what is known, and where new results go.
        bar: shows what is going on.
        batch: windows scored in one pass. No codec here looks across a batch, so that it changes
            scores by no more than the order of sums does.

    Raises:
        OptionError: the text is shorter than one window.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        text: str,
        window: int,
        limit: int | None,
        calibration: str | None,
        options: CalibrationOptions,
        results: Results,
        bar: Progress,
        batch: int = 1,
    ) -> None:
        self.source = Source(model, tokenizer, calibration, options, bar)
        self.results, self.bar, self.batch = results, bar, batch
        self._read(text, window, limit)

    def on(self, text: str, window: int, limit: int | None = None, batch: int = 1) -> Lab:
        """Another text, or other windows, for the same model and calibration, which is not
        repeated; arguments as of the class."""
        other = copy.copy(self)
        other.batch = batch
        other._read(text, window, limit)
        return other

    def _read(self, text: str, window: int, limit: int | None) -> None:
        self.window = window
        ids = self.source.ids(text)
        self.all_windows = token_windows(ids, window)
        self.windows = token_windows(ids, window, limit)
        self._runs: dict[int, list[Tensor]] = {}
        self._identity = {**self.source.identity, "text": digest(text), "window": window}

    @property
    def prepared(self) -> Prepared:
        """The captured model with its calibration tokens; made when first needed."""
        return self.source.prepared

    @property
    def fits(self) -> Fits:
        """Formats and tables of every point."""
        return self.source.fits

    def identity(self, measure: str, point: Point, **more: Any) -> dict[str, Any]:
        """All that a value depends on."""
        own = {"measure": measure, "recipe": point.recipe, "bits": point.bits}
        return {**own, **self._identity, **more}

    def program(self, point: Point) -> Program:
        """The rewritten graph of a point that has pages."""
        return self.source.program(point)

    def candidate(self, point: Point) -> tuple[Logits, Size]:
        """Logits of a point, every token read from its cache, and the cache's size."""
        captured, layers = self.prepared.captured, self.prepared.layers
        if point.recipe == ORIGINAL:
            return original_logits(captured), lambda: (8.0 * captured.dtype.itemsize, None)
        if point.recipe in SIMULATED:
            codec = self.source.simulated(point)
            bits = mean_bits(layers, codec, self.window)
            return fake_logits(captured, layers, codec), lambda: (bits, None)
        logits, last = program_logits(captured, self.program(point))
        return logits, lambda: (last[0].effective_bits(), last[0].nbytes())

    def scores(self, points: Sequence[Point]) -> list[Row]:
        """Perplexity and divergence on the text, the original first."""
        every = [ORIGINAL_POINT, *points]
        self.score(points, len(self.windows))
        return [self._row(point) for point in every]

    def score(self, points: Sequence[Point], count: int) -> None:
        """Score the original and some points on the first ``count`` windows, where they are not
        yet; results are kept as they come."""
        every = (ORIGINAL_POINT, *points)
        missing = [point for point in every if len(self._scored(point)) < count]
        if not missing:
            return
        original = original_logits(self.prepared.captured)
        candidates = {point: self.candidate(point) for point in missing}
        starts = range(0, count, self.batch)
        with torch.inference_mode():
            for start in self.bar.each("score windows", starts, len(starts)):
                group = self.windows[start : min(start + self.batch, count)]
                due = [p for p in missing if len(self._scored(p)) < start + len(group)]
                base = original(torch.cat(group))[:, :-1] if due else None
                for point in due:
                    assert base is not None
                    known = len(self._scored(point)) - start  # of the group, from an earlier run
                    self._score(point, *candidates[point], group[known:], base[known:])

    def needle(self, point: Point) -> Any:
        """Needle in a haystack, by depth."""

        def measure() -> Any:
            hay = torch.cat(self.all_windows, 1)[0]
            seed = self.source.options.windows.seed
            cases = needle_cases(hay, self.source.tokenizer, self.window, seed=seed)
            logits, _ = self.candidate(point)
            steps = self.bar.each(f"needle, {point.name}", cases, len(cases))
            return {"depths": needle_score(logits, steps)}

        return self._known(self.identity("needle", point), measure)

    def agreement(self, point: Point, tokens: int) -> Any:
        """Greedy tokens shared with the original."""

        def measure() -> Any:
            logits, _ = self.candidate(point)
            return {"runs": agreement(logits, self._greedy(tokens), tokens)}

        return self._known(self.identity("agreement", point, tokens=tokens), measure)

    def errors(self, point: Point) -> Any:
        """Which layer, head and channel hurts."""

        def measure() -> Any:
            return layer_errors(self.prepared, self.fits.stored(point), self.bar)

        return self._known(self.identity("errors", point), measure)

    def _known(self, identity: dict[str, Any], measure: Callable[[], Any]) -> Any:
        value = self.results.get(identity)
        if value is None:
            value = measure()
            self.results.put(identity, value)
        return value

    def _greedy(self, tokens: int) -> list[Tensor]:
        """The original's continuations of the first windows' beginnings; made once."""
        if tokens not in self._runs:
            self.bar.stage("greedy continuations of the original")
            prompts = [ids[:, : max(1, self.window - tokens)] for ids in self.windows[:PROMPTS]]
            self._runs[tokens] = continuations(self.source.model, prompts, tokens)
        return self._runs[tokens]

    def _scored(self, point: Point) -> list[dict[str, float]]:
        value = self.results.get(self.identity("score", point))
        return [] if value is None else value["windows"]

    def _score(
        self, point: Point, logits: Logits, size: Size, group: Sequence[Tensor], base: Tensor
    ) -> None:
        """Compare a point's logits of some windows with the original's."""
        ids = torch.cat(list(group))
        found, targets = logits(ids)[:, :-1], ids[:, 1:].to(base.device)
        bits, total = size()
        windows = [
            dict(zip(("loss", "kl", "top1"), compare(*rows).tolist(), strict=True))
            for rows in zip(base, found, targets, strict=True)
        ]
        value = {
            "effective_bits": bits,
            "cache_bytes": None if total is None else total // len(ids),
            "windows": [*self._scored(point), *windows],
        }
        self.results.put(self.identity("score", point), value)

    def _row(self, point: Point) -> Row:
        value = self.results.get(self.identity("score", point))
        return scored_row(
            point, value, self._scored(ORIGINAL_POINT), len(self.windows), self.window
        )


def scored_row(
    point: Point,
    value: Mapping[str, Any],
    original: Sequence[Mapping[str, float]],
    count: int,
    window: int,
) -> Row:
    """A point's line of the table, from the value of its result.

    Args:
        point: what was scored.
        value: of its result, with at least ``count`` windows.
        original: the original's windows, the same ones.
        count: windows to look at, the first ones.
        window: tokens of one.
    """
    found, base = (_stacked(w[:count]) for w in (value["windows"], original))
    result = summary(found, base, count * (window - 1))
    loss = 100 * math.expm1(float((found - base)[:, 0].mean()))
    size = value["effective_bits"], value["cache_bytes"]
    return Row(point.name, point.nominal, *size, result, loss)


def _stacked(windows: Sequence[Mapping[str, float]]) -> Tensor:
    """float64 [W, 3], as ``compare`` gives a window."""
    return torch.tensor([[w["loss"], w["kl"], w["top1"]] for w in windows], dtype=torch.float64)
