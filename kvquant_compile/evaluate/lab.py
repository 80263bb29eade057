"""The laboratory: points, windows and measures of one model, resumed from its results.

Nothing is calibrated or run for what the results hold already.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvquant_compile import __version__
from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.calib.fingerprint import fingerprint
from kvquant_compile.evaluate.agreement import PROMPTS, agreement, continuations
from kvquant_compile.evaluate.baselines import Bf16, KVQuantReleased
from kvquant_compile.evaluate.fake import FakeCodec, fake_logits
from kvquant_compile.evaluate.fits import Fits
from kvquant_compile.evaluate.layer_errors import layer_errors
from kvquant_compile.evaluate.needle import needle_cases, needle_score
from kvquant_compile.evaluate.points import BF16, ORIGINAL, SIMULATED, Point
from kvquant_compile.evaluate.results import Results
from kvquant_compile.evaluate.run import Prepared, prepare
from kvquant_compile.evaluate.score import Logits, compare, summary
from kvquant_compile.evaluate.table import Row, mean_bits, original_logits, program_logits
from kvquant_compile.evaluate.text import text_windows
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
    ) -> None:
        self.model, self.tokenizer, self.window = model, tokenizer, window
        self.calibration, self.options = calibration, options
        self.results, self.bar = results, bar
        self.windows = text_windows(text, tokenizer, window, limit)
        self.all_windows = text_windows(text, tokenizer, window)
        self._runs: dict[int, list[Tensor]] = {}
        self._identity = {
            "model": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "text": _digest(text),
            "window": window,
            "library": __version__,
            "calibration": {
                "text": None if calibration is None else _digest(calibration),
                "windows": options.windows.windows,
                "seed": options.windows.seed,
            },
        }

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The captured model with its calibration tokens; made when first needed."""
        return prepare(self.model, self.calibration, self.tokenizer, self.options, self.bar)

    @functools.cached_property
    def fits(self) -> Fits:
        """Formats and tables of every point."""
        return Fits(self.prepared, self.options, self.bar)

    def identity(self, measure: str, point: Point, **more: Any) -> dict[str, Any]:
        """All that a value depends on."""
        own = {"measure": measure, "recipe": point.recipe, "bits": point.bits}
        return {**own, **self._identity, **more}

    def program(self, point: Point) -> Program:
        """The rewritten graph of a point that has pages."""
        return self.fits.stored(point).program(self.prepared)

    def candidate(self, point: Point) -> tuple[Logits, Size]:
        """Logits of a point, every token read from its cache, and the cache's size."""
        captured, layers = self.prepared.captured, self.prepared.layers
        if point.recipe == ORIGINAL:
            return original_logits(captured), lambda: (8.0 * captured.dtype.itemsize, None)
        if point.recipe in SIMULATED:
            codec: FakeCodec = (
                Bf16()
                if point.recipe == BF16
                else KVQuantReleased.fit(self.prepared.observed, point.whole())
            )
            bits = mean_bits(layers, codec, self.window)
            return fake_logits(captured, layers, codec), lambda: (bits, None)
        logits, last = program_logits(captured, self.program(point))
        return logits, lambda: (last[0].effective_bits(), last[0].nbytes())

    def scores(self, points: Sequence[Point]) -> list[Row]:
        """Perplexity and divergence on the text, the original first."""
        every = [ORIGINAL_POINT, *points]
        if any(len(self._scored(point)) < len(self.windows) for point in every):
            self._score(every)
        return [self._row(point) for point in every]

    def needle(self, point: Point) -> Any:
        """Needle in a haystack, by depth."""

        def measure() -> Any:
            hay = torch.cat(self.all_windows, 1)[0]
            cases = needle_cases(hay, self.tokenizer, self.window, seed=self.options.windows.seed)
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
            self._runs[tokens] = continuations(self.model, prompts, tokens)
        return self._runs[tokens]

    def _scored(self, point: Point) -> list[dict[str, float]]:
        value = self.results.get(self.identity("score", point))
        return [] if value is None else value["windows"]

    def _score(self, points: Sequence[Point]) -> None:
        """Run the windows that are missing; results are kept after each."""
        count = len(self.windows)
        missing = [point for point in points if len(self._scored(point)) < count]
        original = original_logits(self.prepared.captured)
        candidates = {point: self.candidate(point) for point in missing}
        steps = self.bar.each("score windows", list(enumerate(self.windows)), count)
        with torch.inference_mode():
            for place, ids in steps:
                due = [point for point in missing if len(self._scored(point)) == place]
                if not due:
                    continue
                base = original(ids)[0, :-1]
                for point in due:
                    logits, size = candidates[point]
                    found = compare(base, logits(ids)[0, :-1], ids[0, 1:].to(base.device))
                    self._add(point, found.tolist(), size())

    def _add(self, point: Point, found: list[float], size: tuple[float, int | None]) -> None:
        window = dict(zip(("loss", "kl", "top1"), found, strict=True))
        value = {
            "effective_bits": size[0],
            "cache_bytes": size[1],
            "windows": [*self._scored(point), window],
        }
        self.results.put(self.identity("score", point), value)

    def _row(self, point: Point) -> Row:
        value = self.results.get(self.identity("score", point))
        count = len(self.windows)
        found, base = (
            _stacked(w[:count]) for w in (value["windows"], self._scored(ORIGINAL_POINT))
        )
        result = summary(found, base, count * (self.window - 1))
        loss = 100 * math.expm1(float((found - base)[:, 0].mean()))
        size = value["effective_bits"], value["cache_bytes"]
        return Row(point.name, point.nominal, *size, result, loss)


def _stacked(windows: Sequence[dict[str, float]]) -> Tensor:
    """float64 [W, 3], as ``compare`` gives a window."""
    return torch.tensor([[w["loss"], w["kl"], w["top1"]] for w in windows], dtype=torch.float64)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
