"""The command line; ``kvquant-compile --help`` lists the commands."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvquant_compile.cli_eval import evaluate
from kvquant_compile.cli_memory import show_memory
from kvquant_compile.cli_options import (
    BitsOption,
    BudgetOption,
    CalibrationOption,
    DtypeOption,
    DumpOption,
    JsonOption,
    ModelOption,
    OneFormatOption,
    OwnTextOption,
    WindowsOption,
    table_console,
)
from kvquant_compile.config import FormatOptions
from kvquant_compile.errors import KVQuantError, OptionError
from kvquant_compile.loading import load_model, load_tokenizer

app = typer.Typer(
    help="Store a decoder's KV cache in 2 to 4 bits; see the README.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point; our own errors end as one message and exit code 2."""
    try:
        app()
    except KVQuantError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        raise SystemExit(2) from error


@app.command()
def demo(
    model: Annotated[str | None, typer.Option("--model", help="Default: the embedded one.")] = None,
    bits: BitsOption = "4,3,2",
    json: JsonOption = False,
    dtype: DtypeOption = "float32",
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 60,
    window: Annotated[int, typer.Option(help="Tokens per evaluation window.")] = 2048,
    limit: Annotated[int, typer.Option(help="Evaluation windows.")] = 4,
) -> None:
    """Optimise a small model at several widths and show what that costs and saves."""
    from kvquant_compile.demo import run_demo

    result = run_demo(model, _widths(bits), dtype, tokens, window, limit, quiet=json)
    if json:
        typer.echo(json_module.dumps(result, indent=2))


app.command("eval")(evaluate)
app.command("memory")(show_memory)


@app.command()
def calibrate(
    model: ModelOption,
    output: Annotated[Path, typer.Argument(help="Artifact to write (*.safetensors).")],
    bits: OneFormatOption = None,
    budget: BudgetOption = None,
    calibration: CalibrationOption = None,
    windows: WindowsOption = None,
    own_text: OwnTextOption = None,
    dtype: DtypeOption = "auto",
    seed: int = 0,
) -> None:
    """Fit tables and save them; ``optimize(model, calibration="file.safetensors")`` uses them."""
    import kvquant_compile

    network = _optimised(model, bits, budget, calibration, windows, own_text, dtype, seed)
    kvquant_compile.artifact(network).save(output)
    typer.echo(f"wrote {output} ({output.stat().st_size:,} bytes)")


@app.command()
def explain(
    model: ModelOption,
    bits: OneFormatOption = None,
    budget: BudgetOption = None,
    calibration: CalibrationOption = None,
    windows: WindowsOption = None,
    own_text: OwnTextOption = None,
    dtype: DtypeOption = "auto",
    seed: int = 0,
    layer: Annotated[int | None, typer.Option(help="Only this cache layer.")] = None,
    source: Annotated[bool, typer.Option("--source", help="Print generated kernels too.")] = False,
    certificates: Annotated[
        Path | None, typer.Option(help="Folder to write every layer's proof to, as JSON.")
    ] = None,
    json: JsonOption = False,
    dump: DumpOption = None,
) -> None:
    """Optimise a model and print what was matched, proved and rewritten."""
    import kvquant_compile
    from kvquant_compile.inspect.certificates import save as save_certificates

    network = _optimised(model, bits, budget, calibration, windows, own_text, dtype, seed, dump)
    if certificates is not None:
        save_certificates(kvquant_compile.certificates(network), certificates)
    report = kvquant_compile.explain(network, layer=layer, source=source)
    if json:
        typer.echo(json_module.dumps(report.to_dict(), indent=2))
    else:
        table_console().print(report)


@app.command()
def export(
    model: ModelOption,
    output: Annotated[Path, typer.Argument(help="File to write (*.onnx, *.pt2).")],
    format: Annotated[str, typer.Option("--format", help="onnx or pt2.")] = "onnx",
    opset: Annotated[int, typer.Option(help="Of ONNX, 18 to 23.")] = 20,
    ops: Annotated[
        str, typer.Option(help="Of pt2: kvquant, or standard (torch only).")
    ] = "kvquant",
    bits: OneFormatOption = None,
    budget: BudgetOption = None,
    calibration: CalibrationOption = None,
    windows: WindowsOption = None,
    own_text: OwnTextOption = None,
    seed: int = 0,
) -> None:
    """Optimise a model and write it as a file for onnxruntime or torch.export."""
    from kvquant_compile.export import export_onnx, export_pt2

    if format not in ("onnx", "pt2"):
        raise OptionError(
            f"--format {format}", why="known are onnx and pt2", do="Pass one of them."
        )
    network = _optimised(model, bits, budget, calibration, windows, own_text, "float32", seed)
    if format == "onnx":
        export_onnx(network, output, opset=opset)
    else:
        export_pt2(network, output, ops=ops)
    typer.echo(f"wrote {output} ({output.stat().st_size:,} bytes)")


@app.command()
def optimize(
    model: ModelOption,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    bits: OneFormatOption = None,
    budget: BudgetOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 100,
    calibration: CalibrationOption = None,
    windows: WindowsOption = None,
    own_text: OwnTextOption = None,
    dtype: DtypeOption = "auto",
    seed: int = 0,
    dump: DumpOption = None,
) -> None:
    """Optimise a model and continue a prompt with it."""
    network = _optimised(model, bits, budget, calibration, windows, own_text, dtype, seed, dump)
    tokenizer = load_tokenizer(model)
    inputs = tokenizer(prompt, return_tensors="pt").to(network.device)
    output = network.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))


@app.command()
def selftest(model: ModelOption, dtype: DtypeOption = "float32") -> None:
    """Capture, prove and validate a model losslessly, and sabotage its cache to see it matter."""
    from kvquant_compile.evaluate.selftest import run_selftest

    network, _ = load_model(model, dtype)
    checks = run_selftest(network)
    for name, (passed, detail) in checks.items():
        typer.echo(f"{'ok  ' if passed else 'FAIL'} {name}: {detail}")
    if not all(passed for passed, _ in checks.values()):
        raise typer.Exit(1)


def _widths(text: str) -> list[int]:
    try:
        widths = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(
            f"--bits {text}", why="it is no list of whole numbers", do="Pass --bits 4,3,2."
        ) from error
    for width in widths:
        FormatOptions(width)
    return widths


def _one_format(text: str | None) -> Any:
    """What ``bits`` of ``optimize`` takes."""
    if text is None or text == "auto":
        return text
    number = _number(text)
    if isinstance(number, float) and not number.is_integer():
        return number
    widths = _widths(text)
    if len(widths) > 2:
        raise OptionError(
            f"--bits {text}", why="one model has one format", do="Pass one width, or key,value."
        )
    return (widths[0], widths[1]) if len(widths) == 2 else widths[0]


def _number(text: str | None) -> float | str | None:
    """A number where it is one."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _optimised(
    name: str,
    bits: str | None,
    budget: str | None,
    calibration: Path | None,
    windows: int | None,
    own_text: float | None,
    dtype: str,
    seed: int,
    dump: Path | None = None,
) -> Any:
    import kvquant_compile
    from kvquant_compile.evaluate.text import read_text

    asked = _one_format(bits)
    network, tokenizer = load_model(name, dtype)
    data: Any = calibration
    if calibration is not None and calibration.suffix != ".safetensors":
        data = read_text(calibration)
    return kvquant_compile.optimize(
        network,
        bits=asked,
        budget=_number(budget),
        calibration=data,
        tokenizer=tokenizer,
        windows=windows,
        own_text=own_text,
        seed=seed,
        dump=dump,
    )
