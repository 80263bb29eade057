"""Capture of hand-written decoders: ``forward(ids, past) -> (logits, past)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from kvquant_compile.capture.attention_sites import mark_attention
from kvquant_compile.capture.cache_inputs import mark_appends
from kvquant_compile.capture.captured import CacheLayout, Captured
from kvquant_compile.capture.cleanup import evaluation_mode, flat_graph
from kvquant_compile.capture.functional_check import self_check
from kvquant_compile.errors import KVQuantError, OptionError, UnsupportedModelError
from kvquant_compile.observer import SILENT, Observer

_BATCH, _TOKENS, _PAST = 2, 6, 5
_CONVENTION = (
    "Write forward(ids, past) -> (logits, past) with past one (key, value) pair per layer, or"
    " None at first, grown by torch.cat; or use a transformers model."
)


@dataclass(frozen=True)
class Decoder:
    """A functional decoder with the inputs that start it."""

    model: nn.Module
    ids: Tensor
    empty: Any
    layout: CacheLayout

    def call(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        """Logits and the grown cache."""
        logits, grown = self.model(ids, past)
        return logits, grown


class _Flat(nn.Module):
    """The decoder with the cache's tensors as inputs."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.model, self.spec = decoder.model, decoder.layout.spec

    def forward(self, ids: Tensor, caches: list[Tensor]) -> list[Tensor]:
        logits, grown = self.model(ids, pytree.tree_unflatten(caches, self.spec))
        return [logits, *pytree.tree_leaves(grown)]


def capture_functional(
    model: nn.Module, example_inputs: tuple[Any, ...] | None, observer: Observer = SILENT
) -> Captured:
    """Capture a hand-written decoder of the functional-cache convention.

    Args:
        model: the decoder; it is the same afterwards.
        example_inputs: ``(ids,)`` or ``(ids, past)``: ids int64 [B, S], past an empty cache as
            the model takes it (None if not given).

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
            do=_CONVENTION,
        )
    with evaluation_mode(model), torch.no_grad():
        decoder = _understand(model, example_inputs)
        program = _export(decoder)
        gm = flat_graph(program, all_outputs=True)
        ids = gm.graph.find_nodes(op="placeholder")[0]
        ids.target = ids.name = "ids"
        observer.graph("exported", gm)
        mark_appends(gm, decoder.layout)
        unmasked = any(meaning.mask_assumed for meaning in mark_attention(gm))
        observer.graph("captured", gm)
        evidence = self_check(gm, decoder, parameter.dtype, unmasked)
    return Captured(
        gm, "functional", model, model, parameter.device, parameter.dtype,
        cache_layout=decoder.layout, evidence=evidence,
    )  # fmt: skip


def _understand(model: nn.Module, example_inputs: tuple[Any, ...]) -> Decoder:
    """Run the decoder twice and see how its cache is laid out and grows."""
    ids, past = (*example_inputs, None)[:2]
    repeats = 1 + _BATCH * (_TOKENS + _PAST) // ids.numel()
    ids = ids.reshape(-1).repeat(repeats)[: _BATCH * (_TOKENS + _PAST)].reshape(_BATCH, -1)
    filled = any(0 not in leaf.shape for leaf in pytree.tree_leaves(past) if leaf is not None)
    empty = None if filled else past
    try:
        short, longer = (model(ids[:, :n], empty)[1] for n in (_PAST, _PAST + 1))
        leaves, spec = pytree.tree_flatten(short)
        layout = _layout(leaves, pytree.tree_leaves(longer), short, spec)
    except KVQuantError:
        raise
    except Exception as error:
        raise _unlike_convention(model, f"model(ids, past) fails: {error}") from error
    if layout is None:
        raise _unlike_convention(model, "its cache is no list of (key, value) pairs [B, H, S, D]")
    return Decoder(model, ids, empty, layout)


def _unlike_convention(model: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} cannot be captured", why=why,
                                 do=_CONVENTION)  # fmt: skip


def _layout(short: list[Tensor], longer: list[Tensor], past: Any, spec: Any) -> CacheLayout | None:
    pairs = [layer for layer in past if isinstance(layer, (list, tuple)) and len(layer) == 2]
    if not pairs or len(pairs) != len(past) or len(short) != 2 * len(pairs):
        return None
    heads_first = []
    for a, b in zip(short, longer, strict=True):
        grown = [i for i in range(a.ndim) if a.shape[i] != b.shape[i]]
        if a.ndim != 4 or grown not in ([1], [2]):
            return None
        heads_first.append(grown == [2])
    names = tuple((i, name) for i in range(len(pairs)) for name in ("key", "value"))
    return CacheLayout(spec, names, tuple(heads_first))


def _export(decoder: Decoder) -> torch.export.ExportedProgram:
    past = decoder.call(decoder.ids[:, :_PAST], decoder.empty)[1]
    caches = [leaf.clone() for leaf in pytree.tree_leaves(past)]
    sizes = [{0: Dim.AUTO, 2 if first else 1: Dim.AUTO} for first in decoder.layout.heads_first]
    try:
        return torch.export.export(
            _Flat(decoder),
            (decoder.ids[:, _PAST:].contiguous(), caches),
            dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}, "caches": sizes},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__} cannot be captured",
            why=f"torch.export failed: {str(error).strip().splitlines()[0]}",
            do="Python control flow must not depend on tensor data.",
        ) from error
