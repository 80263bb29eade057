"""The few names of torch outside its documented API; tested with torch 2.11 to 2.13."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import CodeGen
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_ASSERTS = ("aten._assert_scalar.default", "aten._assert_tensor_metadata.default")


def is_fake(*values: Tensor | None) -> bool:
    """Whether any tensor is a fake one, which has a shape and no data."""
    return any(isinstance(value, FakeTensor) for value in values)


def is_symbolic(value: Any) -> bool:
    """Whether an integer is a tracer's symbol rather than a number."""
    return isinstance(value, torch.SymInt)


def size_hint(size: Any) -> int:
    """The length that a tracer's symbol had in the example; asking for it adds no guard."""
    return int(size.node.hint)


def loses_class(weight: nn.Parameter) -> bool:
    """Whether a tracer's stand-in for a weight is a plain tensor without what its class adds.

    Tensor subclasses that wrap others are taken apart and put together again; others (the packed
    weights of bitsandbytes, whose scales are attributes) are not.
    """
    return type(weight) is not nn.Parameter and not is_traceable_wrapper_subclass(weight)


def plain_calling_convention(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule over the same submodules, called with positional tensors and ints.

    ``ExportedProgram.module()`` checks and flattens its inputs by the signature of the exported
    function; the plain code generator takes the placeholders as they are.
    """
    gm.graph.set_codegen(CodeGen())
    return fx.GraphModule(gm, gm.graph)


def drop_runtime_checks(graph: fx.Graph) -> None:
    """Erase the shape assertions and guards of an exported graph.

    Sound only for a graph that is compared with its original at several lengths afterwards.
    """
    for node in reversed(list(graph.nodes)):
        check = node.op == "call_function" and str(node.target) in _ASSERTS
        if check or (node.op == "call_module" and "_guards_fn" in str(node.target)):
            graph.erase_node(node)
