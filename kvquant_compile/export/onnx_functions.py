"""From functions in torch to ONNX functions: bodies of standard operators, traced once each."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvquant_compile.export.codec_steps import Function, Outputs
from kvquant_compile.export.extras import need
from kvquant_compile.export.translations import translations

DOMAIN, DOMAIN_VERSION = "kvquant", 1
# Elements of a constant that may be folded: scalars and shapes, no weights.
LARGEST_FOLDED = 64
_TYPES = {float: torch.float32, int: torch.int64}
# Hints for free sizes; 0 and 1 would be taken for constants.
_FIRST_HINT, _HINT_STEP = 3, 2


class Symbols:
    """Emits functions as single nodes while a graph is traced, and remembers which.

    Attributes:
        found: the functions by node type and variant.
    """

    def __init__(self) -> None:
        self.found: dict[str, Function] = {}
        self._names: dict[tuple[str, str], str] = {}

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> Outputs:
        """A node of our domain in the graph that is being traced."""
        outputs = function.signature.outputs
        made = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{self._name(function)}",
            list(inputs),
            dict(function.settings),
            dtypes=[x.dtype for x in outputs],
            shapes=function.signature.output_shapes(inputs),
            version=DOMAIN_VERSION,
        )
        return tuple(made)

    def _name(self, function: Function) -> str:
        """The function's name; those of later variants end in their number."""
        key = function.name, function.variant
        if key not in self._names:
            same = sum(name == function.name for name, _ in self._names)
            self._names[key] = function.name + (f"_{same + 1}" if same else "")
            self.found[self._names[key]] = function
        return self._names[key]


class _Body(nn.Module):
    def __init__(self, function: Function, symbols: Symbols) -> None:
        super().__init__()
        self.function, self.symbols = function, symbols

    def forward(self, *inputs: Tensor) -> Outputs:
        return self.function.body(self.symbols, inputs)


def all_functions(symbols: Symbols, opset: int) -> list[Any]:
    """ONNX functions (``onnx_ir.Function``) of all that was emitted, the inner ones included."""
    made: dict[str, Any] = {}
    while left := [name for name in symbols.found if name not in made]:
        for name in left:
            made[name] = _function(name, symbols, opset)
    return list(made.values())


def to_onnx(
    program: torch.export.ExportedProgram,
    opset: int,
    *,
    merge: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Any:
    """An exported program as an ONNX model (``onnx_ir.Model``), without the exporter's chatter.

    The exporter's own optimiser is left out: it gives weights and tables new names, and takes as
    long as everything else.

    Args:
        program: with free sizes.
        opset: of the standard operators.
        merge: use one constant for all that are equal.
        input_names, output_names: of the file; None for the exporter's.
    """
    ir, passes, optimizer = need("onnx_ir", "onnx_ir.passes.common", "onnxscript.optimizer")
    with quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=translations(),
            verbose=False,
            optimize=False,
            input_names=input_names,
            output_names=output_names,
        )
        assert made is not None
        model = made.model
        optimizer.fold_constants(model, input_size_limit=LARGEST_FOLDED, should_fold=_kept_as_it_is)
        constants = (
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.DeduplicateInitializersPass(),
        )
        ir.passes.Sequential(
            *(constants if merge else ()),
            passes.IdentityEliminationPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
        )(model)
    return model


def _kept_as_it_is(node: Any) -> bool | None:
    """Transposed weights would be new tensors without a name."""
    return False if node.op_type == "Transpose" else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No logs, warnings or prints of the exporter inside the block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _function(name: str, symbols: Symbols, opset: int) -> Any:
    """The ONNX function of one emitted function."""
    (ir,) = need("onnx_ir")
    function = symbols.found[name]
    model = to_onnx(_traced(function, symbols), opset, merge=True)
    graph, count = model.graph, len(function.signature.inputs)
    attributes = _take_settings(ir, graph, function, count)
    _constants_for_initializers(ir, graph)
    for value, argument in zip(graph.inputs, function.signature.inputs, strict=True):
        value.name = argument.name
    made = ir.Function(DOMAIN, name, graph=graph, attributes=attributes)
    made.doc_string = f"{function.about} ({function.variant})"
    return made


def _traced(function: Function, symbols: Symbols) -> torch.export.ExportedProgram:
    signature = function.signature
    hints = {size: _FIRST_HINT + _HINT_STEP * i for i, size in enumerate(signature.free_sizes)}
    free = dict.fromkeys(hints, torch.export.Dim.DYNAMIC)
    tensors = [argument.example(hints) for argument in signature.inputs]
    settings = [torch.tensor(value, dtype=_TYPES[type(value)]) for _, value in function.settings]
    shapes: list[dict] = [argument.dynamic(free) for argument in signature.inputs]
    with quiet(), torch.no_grad():
        return torch.export.export(
            _Body(function, symbols),
            (*tensors, *settings),
            dynamic_shapes=((*shapes, *({} for _ in settings)),),
            strict=False,
        )


def _take_settings(ir: Any, graph: Any, function: Function, count: int) -> list[Any]:
    """Turn the inputs after the ``count`` tensors into attributes of the function."""
    attributes = []
    values = list(graph.inputs)[count:]
    del graph.inputs[count:]
    for (name, default), value in zip(function.settings, values, strict=True):
        real = isinstance(default, float)
        kind = ir.AttributeType.FLOAT if real else ir.AttributeType.INT
        field = "value_float" if real else "value_int"
        node = ir.Node("", "Constant", [], [ir.RefAttr(field, name, kind)])
        graph.insert_before(graph[0], node) if len(graph) else graph.append(node)
        value.replace_all_uses_with(node.outputs[0])
        attributes.append(ir.Attr(name, kind, default))
    return attributes


def _constants_for_initializers(ir: Any, graph: Any) -> None:
    """A function has no initialisers; constants take their place."""
    for value in list(graph.initializers.values()):
        attribute = ir.AttrTensor("value", value.const_value)
        node = ir.Node("", "Constant", [], [attribute])
        graph.insert_before(graph[0], node)
        value.replace_all_uses_with(node.outputs[0])
        del graph.initializers[value.name]
