"""From an exported program to the flat graph that the passes read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx, nn

from kvquant_compile.capture.edit import SIZE, add_call
from kvquant_compile.capture.markers import MASK
from kvquant_compile.capture.torch_internals import drop_runtime_checks, plain_calling_convention

_CASTS = ("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten._to_copy.default")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside the block; each module's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def flat_graph(
    program: torch.export.ExportedProgram, *, all_outputs: bool = False
) -> fx.GraphModule:
    """The program as a plain GraphModule without assertions; returns its first tensor, or all."""
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    drop_runtime_checks(gm.graph)
    output = gm.graph.output_node()
    first = output.args[0]
    while isinstance(first, Sequence) and not all_outputs:
        first = first[0]
    output.args = (first,)
    return plain_calling_convention(gm)


def sizes_from(gm: fx.GraphModule, name: str) -> None:
    """Read batch size and new tokens off one input, whichever input the tracer read them from.

    Positions and masks may then be None or broadcast, as far as the graph does not use them.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    source = next(n for n in inputs if n.target == name)
    shape = source.meta["val"].shape
    last = inputs[-1]
    sizes = [add_call(gm.graph, last, SIZE, (source, d), shape[d]) for d in (1, 0)][::-1]
    for other in inputs:
        for user in [u for u in other.users if u.target is SIZE and u not in sizes]:
            size = user.meta["val"]
            same = [s for s, length in zip(sizes, shape, strict=False) if size is length
                    or str(size) == str(length)]  # fmt: skip
            if same:
                user.replace_all_uses_with(same[0])
    gm.graph.eliminate_dead_code()


def mask_from_input(gm: fx.GraphModule, name: str) -> bool:
    """Feed the graph's 2-D mask to the mask markers directly; whether nothing else reads it.

    The model casts the mask before it reaches the marker, and a cast refuses None. The marker
    casts by itself, so the casts (and flattening views, which keep a 2-D mask) are skipped.
    """
    source = next(n for n in gm.graph.find_nodes(op="placeholder") if n.target == name)
    casts = _casts_of(source)
    for node in gm.graph.find_nodes(op="call_function", target=MASK):
        if node.args[0] in casts:
            node.update_arg(0, source)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return all(user.target is MASK for user in source.users)


def _casts_of(source: fx.Node) -> set[fx.Node]:
    found, pending = set(), [source]
    while pending:
        for user in pending.pop().users:
            view = str(user.target) == "aten.view.default" and user.meta["val"].ndim == 2
            if view or str(user.target) in _CASTS:
                found.add(user)
                pending.append(user)
    return found
