"""What all texts of the laboratory share: a model, its calibration, and what was fitted from it."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from torch import Tensor

from kvquant_compile import __version__
from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.calib.fingerprint import fingerprint
from kvquant_compile.evaluate.baselines import Bf16, KVQuantReleased
from kvquant_compile.evaluate.fake import FakeCodec
from kvquant_compile.evaluate.fits import Fits
from kvquant_compile.evaluate.points import BF16, Point
from kvquant_compile.evaluate.run import Prepared, prepare
from kvquant_compile.evaluate.text import token_ids
from kvquant_compile.progress import Progress
from kvquant_compile.runtime.program import Program


class Source:
    """A model with its calibration, made when it is first needed and kept.

    Args:
        model: a transformers causal LM; stays as it is.
        tokenizer: its tokenizer.
        calibration: a text, or None for the model's own.
        options: of calibration.
        bar: shows what is going on.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        calibration: str | None,
        options: CalibrationOptions,
        bar: Progress,
    ) -> None:
        self.model, self.tokenizer, self.calibration = model, tokenizer, calibration
        self.options, self.bar = options, bar
        self._programs: dict[Point, Program] = {}
        self._simulated: dict[Point, FakeCodec] = {}
        self._ids: dict[str, Tensor] = {}

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The captured model with its calibration tokens."""
        return prepare(self.model, self.calibration, self.tokenizer, self.options, self.bar)

    @functools.cached_property
    def fits(self) -> Fits:
        """Formats and tables of every point."""
        return Fits(self.prepared, self.options, self.bar)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that results depend on here."""
        windows = self.options.windows
        return {
            "model": fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "library": __version__,
            "calibration": {
                "text": None if self.calibration is None else digest(self.calibration),
                "windows": windows.windows,
                "seed": windows.seed,
                "own_text": None if self.calibration is None else self.options.own_text,
            },
        }

    def program(self, point: Point) -> Program:
        """The rewritten graph of a point that has pages."""
        if point not in self._programs:
            self._programs[point] = self.fits.stored(point).program(self.prepared)
        return self._programs[point]

    def simulated(self, point: Point) -> FakeCodec:
        """The codec of a point that has none."""
        if point not in self._simulated:
            bf16 = point.recipe == BF16
            self._simulated[point] = (
                Bf16() if bf16 else KVQuantReleased.fit(self.prepared.observed, point.whole())
            )
        return self._simulated[point]

    def ids(self, text: str) -> Tensor:
        """A text's tokens, int64 [N]."""
        key = digest(text)
        if key not in self._ids:
            self._ids[key] = token_ids(text, self.tokenizer)
        return self._ids[key]


def digest(text: str) -> str:
    """What stands for a text in a result's identity."""
    return hashlib.sha256(text.encode()).hexdigest()
