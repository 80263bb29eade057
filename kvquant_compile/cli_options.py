"""Options that several commands share, and where their tables go."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ModelOption = Annotated[str, typer.Option("--model", help="Model folder or hub id.")]
BitsOption = Annotated[str, typer.Option("--bits", help="Widths, comma separated.")]
OneFormatOption = Annotated[
    str | None,
    typer.Option("--bits", help="A width, key,value, 2.5, or auto with --budget; default: 3, or "
                 "the artifact's."),
]  # fmt: skip
BudgetOption = Annotated[
    str | None, typer.Option("--budget", help="For --bits auto: effective bits, or 900B a token.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="Text file, or artifact (*.safetensors); default: the "
                 "model samples its own text."),
]  # fmt: skip
WindowsOption = Annotated[int | None, typer.Option("--windows", help="Calibration windows.")]
OwnTextOption = Annotated[
    float | None,
    typer.Option("--own-text", help="Part of the calibration tokens that the model samples itself "
                 "beside a given text; default: three quarters."),
]  # fmt: skip
DumpOption = Annotated[
    Path | None,
    typer.Option("--dump", help="Folder for graphs after every pass, plots, and an index.html."),
]


def table_console() -> Console:
    """As wide as the terminal; of one width where there is none, so that files are alike."""
    return Console(width=None if sys.stdout.isatty() else 120)
