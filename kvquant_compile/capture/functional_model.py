"""Capture of hand-written decoders, of any of the conventions of :mod:`.decoder`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from kvquant_compile.capture.cache_sites import mark_cached_attention
from kvquant_compile.capture.cache_updates import find_updates
from kvquant_compile.capture.captured import CacheLayout, Captured
from kvquant_compile.capture.cleanup import evaluation_mode, flat_graph
from kvquant_compile.capture.decoder import (
    CONVENTIONS,
    PAST,
    TOKENS,
    Decoder,
    unlike_conventions,
)
from kvquant_compile.capture.edit import SIZE, add_call
from kvquant_compile.capture.functional_check import self_check
from kvquant_compile.capture.ops import op_name
from kvquant_compile.capture.stateful import decoder_of
from kvquant_compile.errors import KVQuantError, OptionError, UnsupportedModelError
from kvquant_compile.observer import SILENT, Observer

_BATCH = 2


class _Grown(nn.Module):
    """A step whose caches grow: the cached tokens are as many as the caches are long."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.model, self.decoder = decoder.model, decoder

    def forward(self, ids: Tensor, caches: list[Tensor]) -> list[Tensor]:
        return self.decoder.step(ids, caches[0].shape[self.decoder.leaves[0].axis], caches)


class _Written(nn.Module):
    """A step whose caches are written in place behind ``past`` tokens."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.model, self.decoder = decoder.model, decoder

    def forward(self, ids: Tensor, past: int, caches: list[Tensor]) -> list[Tensor]:
        return self.decoder.step(ids, past, caches)


def capture_functional(
    model: nn.Module, example_inputs: tuple[Any, ...] | None, observer: Observer = SILENT
) -> Captured:
    """Capture a hand-written decoder.

    Args:
        model: the decoder; it is the same afterwards.
        example_inputs: ``(ids,)`` or ``(ids, past)``: ids int64 [B, S]; past an empty cache as the
            model takes it (None if not given), or a start position.
        observer: is told of the graph at every stage.

    Raises:
        OptionError: no example inputs.
        UnsupportedModelError: another convention, or a graph that does not reproduce the model.
        UnsupportedLayerError: an attention of unknown meaning.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if not example_inputs or not isinstance(example_inputs[0], Tensor) or parameter is None:
        raise OptionError(
            "the model cannot be captured",
            why="it is no transformers model, and example_inputs=(ids, past) is not given",
            do=CONVENTIONS,
        )
    with evaluation_mode(model), torch.no_grad():
        decoder = _understood(model, example_inputs)
        gm = _export(decoder)
        observer.graph("exported", gm)
        updates = find_updates(gm, decoder.leaves, gm.graph.find_nodes(op="placeholder")[0])
        meanings = mark_cached_attention(gm, updates)
        unmasked = any(meaning.mask_assumed for meaning in meanings)
        observer.graph("captured", gm)
        with decoder.undisturbed():
            evidence = self_check(gm, decoder, parameter.dtype, unmasked)
    layers = len(decoder.leaves) // 2
    names = tuple((i, name) for i in range(layers) for name in ("key", "value"))
    layout = CacheLayout(None, names, tuple(leaf.heads_first for leaf in decoder.leaves))
    return Captured(
        gm, "functional", model, model, parameter.device, parameter.dtype,
        cache_layout=layout, evidence=evidence, decoder=decoder,
    )  # fmt: skip


def _understood(model: nn.Module, example_inputs: tuple[Any, ...]) -> Decoder:
    """The decoder, run and seen to follow a convention; with two sequences if it takes them."""
    ids, past = (*example_inputs, None)[:2]
    length, failure = PAST + TOKENS, None
    for batch in dict.fromkeys((_BATCH, int(ids.shape[0]))):
        repeats = 1 + batch * length // max(1, ids.numel())
        tried = ids.reshape(-1).repeat(repeats)[: batch * length].reshape(batch, length)
        decoder = decoder_of(model, tried, past)
        try:
            decoder.observe()
            return decoder
        except KVQuantError as error:
            failure = error
        except Exception as error:
            failure = unlike_conventions(model, f"model(ids, past) fails: {error}")
            failure.__cause__ = error
    assert failure is not None
    raise failure


def _export(decoder: Decoder) -> fx.GraphModule:
    """A step as a graph without in-place operations, of ``ids``, maybe ``past``, and caches."""
    caches = decoder.example()
    ids = decoder.ids.reshape(-1)[: _BATCH * TOKENS].reshape(_BATCH, TOKENS)
    both: dict[str, Any] = {"ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    wrapped: nn.Module
    inputs: tuple[Any, ...]
    if decoder.capacity:
        wrapped, inputs = _Written(decoder), (ids, PAST, caches)
        shapes = {**both, "past": Dim.DYNAMIC, "caches": [{0: Dim.AUTO} for _ in caches]}
    else:
        wrapped, inputs = _Grown(decoder), (ids, caches)
        shapes = {**both, "caches": [{0: Dim.AUTO, x.axis: Dim.AUTO} for x in decoder.leaves]}
    try:
        program = torch.export.export(
            wrapped,
            inputs,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        if _writes(program.graph):
            program = program.run_decompositions({})
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__} cannot be captured",
            why=f"torch.export failed: {str(error).strip().splitlines()[0]}",
            do="Python control flow must not depend on tensor data.",
        ) from error
    gm = flat_graph(program, all_outputs=True)
    names = ["ids", "past"] if decoder.capacity else ["ids"]
    entries = gm.graph.find_nodes(op="placeholder")
    for node, name in zip(entries, names, strict=False):
        node.target = node.name = name
    _batch_from_ids(gm.graph, entries)
    return gm


def _writes(graph: fx.Graph) -> bool:
    """Whether an operation changes a tensor in place."""
    return any(op_name(node).endswith("_") for node in graph.nodes if node.op == "call_function")


def _batch_from_ids(graph: fx.Graph, inputs: list[fx.Node]) -> None:
    """Read the batch size off the token ids where the tracer has read it off a cache."""
    ids, *others = inputs
    batch = add_call(graph, inputs[-1], SIZE, (ids, 0), ids.meta["val"].shape[0])
    for node in others:
        for user in [u for u in node.users if u.target is SIZE and u.args[1] == 0]:
            user.replace_all_uses_with(batch)
            graph.erase_node(user)
