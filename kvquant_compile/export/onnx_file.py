"""``export_onnx``: an optimised model as one ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.errors import OptionError
from kvquant_compile.export.accepted import exportable
from kvquant_compile.export.extras import need
from kvquant_compile.export.function_ops import FunctionOps
from kvquant_compile.export.onnx_functions import (
    DOMAIN,
    DOMAIN_VERSION,
    Symbols,
    all_functions,
    quiet,
    to_onnx,
)
from kvquant_compile.export.step import StepModule, stores_of
from kvquant_compile.export.trace import input_names, output_names, trace_step
from kvquant_compile.passes.rewrite import CONSTANT_PREFIX
from kvquant_compile.runtime.installed import Installed, installed

OLDEST_OPSET, NEWEST_OPSET = 18, 23
# Weights of a model beyond this many bytes go into a file of their own.
EXTERNAL_BYTES = 64 * 2**20


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    opset: int = 20,
    external_data: bool | None = None,
) -> Path:
    """Write an optimised model as one ONNX file that serves prefill and decode.

    The graph takes a step of any length: ``input_ids`` and ``token_mask`` int64
    [batch, sequence], ``past_lengths`` int64 [batch] and, for every layer, the packed cache
    ``past.i.pages`` uint8 [batch, capacity, heads, page_bytes] with its exact tokens
    ``past.i.sinks``. It returns ``logits`` [batch, sequence, vocabulary], ``present_lengths`` and
    the cache with the step in it. ``capacity`` is the caller's: at least the pages of 64 tokens
    that the sequences have after the step. Ops of the domain ``kvquant`` carry function bodies of
    standard operators, traced from the codec itself.

    Args:
        model: optimised, float32, on a CPU.
        path: of the file.
        opset: of the standard operators, 18 to 23.
        external_data: put weights into ``path`` + ".data"; None: where they take more than 64 MiB.

    Returns:
        ``path``.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        OptionError: the model is not optimised, or cannot be exported; the message says why.
    """
    need("onnx", "onnx_ir", "onnxscript")
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise OptionError(
            f"opset={opset}",
            why="bytes are taken apart with operators of opset 18, and tested up to 23",
            do=f"Pass {OLDEST_OPSET} to {NEWEST_OPSET}.",
        )
    state = exportable(installed(model))
    onnx_model = build_model(state, opset)
    return _save(onnx_model, Path(path), external_data)


def build_model(state: Installed, opset: int) -> Any:
    """The ONNX model (``onnx_ir.Model``) of an optimised model."""
    symbols, stores = Symbols(), stores_of(state)
    step = StepModule(state, stores, FunctionOps(symbols))
    with quiet():
        program = trace_step(step)
    model = to_onnx(
        program,
        opset,
        input_names=input_names(stores, not step.functional),
        output_names=output_names(stores),
    )
    for function in all_functions(symbols, opset):
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = DOMAIN_VERSION
    _name_sizes(model)
    _name_initializers(model, state)
    model.metadata_props.update(_metadata(state))
    model.producer_name = "kvquant_compile"
    model.graph.name = type(state.captured.model).__name__
    return model


def _name_sizes(model: Any) -> None:
    """Call the free sizes batch, sequence and capacity wherever the exporter numbered them."""
    (ir,) = need("onnx_ir")
    inputs = {value.name: value for value in model.graph.inputs}
    pages = next(value for name, value in inputs.items() if name.endswith(".pages"))
    names = dict(zip(map(str, inputs["input_ids"].shape), ("batch", "sequence"), strict=True))
    names[str(pages.shape[1])] = "capacity"
    nodes = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *nodes):
        if value.shape is not None:
            sizes = (names.get(str(x), x) for x in value.shape)
            value.shape = ir.Shape(sizes)


def _name_initializers(model: Any, state: Installed) -> None:
    """Tables are ``kvquant.<layer>.<name>``, weights what the model calls them."""
    weights = {p.data_ptr(): name for name, p in state.captured.model.named_parameters()}
    inner = state.program.graph_module.named_parameters(remove_duplicate=False)
    shared = {f"rewritten.{name}": weights.get(p.data_ptr()) for name, p in inner}
    for value in list(model.graph.initializers.values()):
        name = shared.get(value.name) or value.name.removeprefix("model.")
        prefix, _, table = name.rpartition(CONSTANT_PREFIX)
        if prefix == "rewritten.":
            name = "kvquant." + table.replace("_", ".", 1)
        if name not in model.graph.initializers:
            value.name = name


def _metadata(state: Installed) -> dict[str, str]:
    """What a reader of the file has to know, and where it came from."""
    report = state.report
    elements = sum(x.kv_heads * (x.key_dim + x.value_dim) for x in report.layers)
    layers = {
        x.index: {"recipe": x.recipe, "key_bits": x.key_bits, "value_bits": x.value_bits,
                  "format": str(layout)}
        for x, layout in zip(report.layers, state.program.layouts, strict=True)
    }  # fmt: skip
    return {
        "kvquant.version": "1",
        "kvquant.model": state.artifact.model,
        "kvquant.class": report.model,
        "kvquant.recipe": ", ".join(dict.fromkeys(x.recipe for x in report.layers)),
        "kvquant.effective_bits": f"{report.effective_bits:.10g}",
        "kvquant.bytes_per_token": f"{report.bytes_per_token:.10g}",
        "kvquant.times_smaller_than_bf16": f"{2 * elements / report.bytes_per_token:.10g}",
        "kvquant.page_tokens": str(PAGE_TOKENS),
        "kvquant.attend_quantized": str(int(state.attend_quantized)),
        "kvquant.layers": json.dumps(layers),
    }


def _save(model: Any, path: Path, external_data: bool | None) -> Path:
    """Write, and check what was written."""
    onnx, ir = need("onnx", "onnx_ir")
    size = sum(x.const_value.nbytes for x in model.graph.initializers.values())
    external = size > EXTERNAL_BYTES if external_data is None else external_data
    options = {"external_data": path.name + ".data"} if external else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, **options)
    onnx.checker.check_model(str(path), full_check=True)
    return path
