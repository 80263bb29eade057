"""``kvquant-compile eval``: the laboratory on the command line."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvquant_compile.cli_options import (
    DtypeOption,
    JsonOption,
    ModelOption,
    OwnTextOption,
    WindowsOption,
    table_console,
)
from kvquant_compile.errors import OptionError
from kvquant_compile.loading import load_model

if TYPE_CHECKING:
    from kvquant_compile.evaluate.lab import Lab
    from kvquant_compile.evaluate.points import Point
    from kvquant_compile.evaluate.table import Row

RECIPES = "kvquant+,kvquant,kivi,int,bf16,fp8"
SECTIONS = "What is measured beside the table"

GridOption = Annotated[
    bool, typer.Option("--grid", help="Key bits times value bits.", rich_help_panel=SECTIONS)
]
NeedleOption = Annotated[
    bool, typer.Option("--needle", help="Needle in a haystack by depth.", rich_help_panel=SECTIONS)
]
AgreementOption = Annotated[
    int, typer.Option("--agreement", help="Greedy tokens to compare.", rich_help_panel=SECTIONS)
]
ErrorsOption = Annotated[
    bool, typer.Option("--errors", help="Layer, head, channel.", rich_help_panel=SECTIONS)
]


@dataclass(frozen=True)
class Wanted:
    """What is measured beside perplexity and divergence."""

    grid: bool
    needle: bool
    agreement: int
    errors: bool


def evaluate(
    model: ModelOption,
    text: Annotated[Path, typer.Option(help="UTF-8 text to score.")],
    recipes: Annotated[
        str, typer.Option(help="Recipes, comma separated; bf16 and fp8 have one width.")
    ] = RECIPES,
    bits: Annotated[
        str, typer.Option(help="Widths, comma separated: 3, 4/2 (keys/values), 2.5, auto:2.9.")
    ] = "4,3,2",
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Use only the first windows.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows of one pass; a GPU likes more.")] = 1,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file; default: the model samples its own text.")
    ] = None,
    windows: WindowsOption = None,
    own_text: OwnTextOption = None,
    results: Annotated[
        Path | None, typer.Option(help="JSON file to write, and to go on from.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot to write (.svg, .png, .pdf).")] = None,
    grid: GridOption = False,
    needle: NeedleOption = False,
    agreement: AgreementOption = 0,
    errors: ErrorsOption = False,
    dtype: DtypeOption = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """Loss against effective bits, every token attending to quantised keys and values."""
    from kvquant_compile.calib.calibrate import CalibrationOptions
    from kvquant_compile.evaluate.lab import Lab
    from kvquant_compile.evaluate.points import parse_points
    from kvquant_compile.evaluate.results import Results
    from kvquant_compile.evaluate.text import read_text
    from kvquant_compile.progress import Progress

    points = parse_points(recipes, bits)
    options = CalibrationOptions.make(seed=seed, windows=windows, own_text=own_text)
    wanted = Wanted(grid, needle, _tokens(agreement, window), errors)
    scored = read_text(text)
    data = None if calibration is None else read_text(calibration)
    known = Results(results)
    network, tokenizer = load_model(model, dtype)
    network.to(device)
    with Progress() as bar:
        lab = Lab(network, tokenizer, scored, window, limit, data, options, known, bar, batch)
        rows = lab.scores(points)
        tables = _sections(lab, points, wanted)
    title = f"{model}: {text.name}, {len(lab.windows)} windows of {window}"
    if plot is not None:
        from kvquant_compile.evaluate.pareto import plot as draw

        draw(rows, title, plot)
    if json:
        typer.echo(json_module.dumps(known.to_dict(), indent=2))
        return
    for table in (_main_table(rows, title), *tables):
        table_console().print(table)


def _main_table(rows: list[Row], title: str) -> Any:
    from kvquant_compile.evaluate.pareto import front
    from kvquant_compile.evaluate.table import render

    return render(rows, title, [row.name for row in front(rows)])


def _sections(lab: Lab, points: list[Point], wanted: Wanted) -> list[Any]:
    """Measure what was asked for beside the scores; one table each."""
    from kvquant_compile.evaluate import sections
    from kvquant_compile.evaluate.points import ORIGINAL, SIMULATED, Point

    tables: list[Any] = []
    if wanted.grid:
        tables += _grids(lab, points)
    if wanted.needle:
        every = [Point(ORIGINAL), *points]
        found = {point.name: lab.needle(point) for point in every}
        tables.append(sections.needle_table(found, lab.window))
    if wanted.agreement:
        runs = {point.name: lab.agreement(point, wanted.agreement) for point in points}
        tables.append(sections.agreement_table(runs, wanted.agreement))
    if wanted.errors:
        stored = [point for point in points if point.recipe not in SIMULATED]
        tables += [sections.errors_table(lab.errors(point), point.name) for point in stored]
    return tables


def _grids(lab: Lab, points: list[Point]) -> list[Any]:
    """A grid of every recipe over its whole widths."""
    from kvquant_compile.evaluate.points import RELEASED, WIDTHLESS, grid_points
    from kvquant_compile.evaluate.sections import grid_table

    names = dict.fromkeys(p.recipe for p in points if p.recipe not in (*WIDTHLESS, RELEASED))
    tables = []
    for recipe in names:
        widths = sorted({int(p.bits) for p in points if p.recipe == recipe and p.bits.isdigit()})
        rows = lab.scores(grid_points(recipe, widths))[1:]
        pairs = [(key, value) for key in widths for value in widths]
        if pairs:
            tables.append(grid_table(dict(zip(pairs, rows, strict=True)), recipe))
    return tables


def _tokens(agreement: int, window: int) -> int:
    if not 0 <= agreement < window:
        raise OptionError(
            f"--agreement {agreement}",
            why=f"prompt and continuation share a window of {window} tokens",
            do="Pass fewer tokens, or a longer window.",
        )
    return agreement
