"""A laboratory of a tiny model and a made-up text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.evaluate.lab import Lab
from kvquant_compile.evaluate.results import Results
from kvquant_compile.progress import Progress
from tests.zoo import tiny

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(700))
DATA = "".join(chr(97 + (3 * i * i + i // 5) % 26) for i in range(800))
OPTIONS = CalibrationOptions.make(windows=2)


class Letters:
    """A token a character."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 125 for c in text]}


def laboratory(path: Path | None = None, limit: int | None = 2, **options: Any) -> Lab:
    settings = {"window": 100, "text": TEXT, **options}
    return Lab(
        tiny("llama"), Letters(), settings["text"], settings["window"], limit, DATA,
        options.get("calibration", OPTIONS), Results(path), Progress(False),
    )  # fmt: skip
