"""``kvquant-compile memory``: what a model takes, and what fits."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from kvquant_compile.cli_options import DtypeOption, JsonOption, ModelOption, table_console


def show_memory(
    model: ModelOption,
    context: Annotated[int, typer.Option(help="Tokens of every sequence.")] = 32768,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    bits: Annotated[int, typer.Option(help="Width; 16 for exact pages.")] = 3,
    memory: Annotated[
        str | None, typer.Option(help='Say the longest context that fits, such as "24 GB".')
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens before the first generated one; default: all.")
    ] = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Print formulas and numbers for cache, tables, workspace and weights.

    Bytes do not depend on what tables were calibrated on, so that a single short window of random
    tokens is used: this says nothing about accuracy.
    """
    import kvquant_compile

    network = _optimised(model, bits, dtype)
    report = kvquant_compile.memory_report(network, context, batch, prompt=prompt)
    longest = None
    if memory is not None:
        longest = kvquant_compile.max_context(network, memory, batch, prompt=prompt)
    if json:
        typer.echo(json_module.dumps({**report.to_dict(), "max_context": longest}, indent=2))
        return
    table_console().print(report)
    if longest is not None:
        typer.echo(f"\n{memory} hold {longest:,} tokens x {batch}")


def _optimised(name: str, bits: int, dtype: str) -> Any:
    import torch

    import kvquant_compile
    from kvquant_compile.loading import load_model

    network, _ = load_model(name, dtype)
    generator = torch.Generator().manual_seed(0)
    vocabulary = network.get_input_embeddings().num_embeddings
    window = torch.randint(vocabulary, (1, 64), generator=generator)
    return kvquant_compile.optimize(
        network, bits=bits, calibration=[window], sensitivity="none", progress=False
    )
