"""Capture of a transformers decoder: hooks in, export, hooks out, compare."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from transformers import PreTrainedModel

from kvquant_compile.capture.attribute_states import attribute_states, marks
from kvquant_compile.capture.audit import audit_firings, audit_graph
from kvquant_compile.capture.backbone import find_backbone, refuse_by_config
from kvquant_compile.capture.cache_inputs import mark_appends
from kvquant_compile.capture.capture_cache import Firings, capture_cache
from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.cleanup import evaluation_mode, flat_graph, mask_from_input, sizes_from
from kvquant_compile.capture.embedding import (
    PER_LAYER,
    TOKEN_IDS,
    extra_inputs,
    random_embedded,
)
from kvquant_compile.capture.failures import (
    export_errors,
    not_running,
)
from kvquant_compile.capture.hf_hooks import attention_by, markers_in
from kvquant_compile.capture.hf_selfcheck import Original, self_check
from kvquant_compile.capture.kept_positions import keeps_positions, pass_all_positions
from kvquant_compile.capture.leaves import Leaf, Watch, call_leaves, opaque, watching
from kvquant_compile.capture.own_attention import (
    cache_inputs,
    export_with_cache,
    marked_graph,
)
from kvquant_compile.capture.own_cache import CacheKind, own_cache
from kvquant_compile.capture.selections import split_selections
from kvquant_compile.capture.slices_written import written_slices_as_values
from kvquant_compile.errors import KVQuantError
from kvquant_compile.observer import SILENT, Observer

# Sizes while tracing: 0 and 1 would be taken for constants, so none of them appears.
_BATCH, _TOKENS, _PAST = 2, 6, 5


class _Flat(nn.Module):
    """The backbone with flat inputs; the cache is built inside, so no Cache is an input."""

    def __init__(self, backbone: nn.Module, kind: CacheKind, seen: Firings) -> None:
        super().__init__()
        self.backbone, self.kind, self.seen = backbone, kind, seen
        self.takes = set(inspect.signature(backbone.forward).parameters)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: int,
        per_layer_inputs: Tensor | None = None,
        ple_input_ids: Tensor | None = None,
    ) -> Tensor:
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        extra = {PER_LAYER: per_layer_inputs, TOKEN_IDS: ple_input_ids}
        inputs |= {name: value for name, value in extra.items() if value is not None}
        cache = capture_cache(self.kind, past, self.seen)
        out = self.backbone(
            inputs_embeds=hidden,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in inputs.items() if name in self.takes},
        )
        self.seen.positions = keeps_positions(cache)
        return out.last_hidden_state


def capture_transformers(model: PreTrainedModel, observer: Observer = SILENT) -> Captured:
    """Capture the text backbone of a transformers model.

    The model is the same afterwards, training mode and attention implementation included.

    Raises:
        UnsupportedModelError: not a decoder with a key-value cache, or one whose graph does not
            reproduce it.
        UnsupportedLayerError: an attention or mask of unknown meaning.
    """
    refuse_by_config(model)
    backbone = find_backbone(model)
    parameter = next(p for p in backbone.parameters() if p.is_floating_point())
    with evaluation_mode(model), torch.no_grad():
        seen, kind = _eager_run(model, backbone, parameter, CacheKind(_text_config(backbone)))
        if seen.attends < seen.appends:
            gm, seen = _own_attention(model, backbone, parameter, kind, observer)
        elif seen.derived:
            gm = _derived_keys(model, backbone, parameter, seen, kind, observer)
        else:
            program, leaves = _export(model, backbone, parameter, seen, kind)
            gm = flat_graph(program)
            observer.graph("exported", gm)
            call_leaves(gm, leaves)
            if seen.positions:
                pass_all_positions(gm)
            split_selections(gm)
        sizes_from(gm, "hidden")
        optional = mask_from_input(gm, "attention_mask")
        observer.graph("captured", gm)
        audit_graph(gm.graph, seen)
        original = Original(backbone, parameter, kind)
        evidence = self_check(gm, original, seen, mask_optional=optional)
        kind.forget()
    return Captured(
        gm, "transformers", model, backbone, parameter.device, parameter.dtype, optional,
        caches=kind, evidence=evidence,
    )  # fmt: skip


def _inputs(
    backbone: PreTrainedModel, like: Tensor, batch: int, tokens: int, past: int
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """Arguments of :class:`_Flat`; what only some backbones ask for by name."""
    extra = random_embedded(backbone, like, batch, tokens, seed=0)
    hidden = extra.pop("hidden")
    mask = torch.ones(batch, past + tokens, dtype=torch.long, device=like.device)
    positions = torch.arange(past, past + tokens, device=like.device).repeat(batch, 1)
    return (hidden, mask, positions, past), extra


def _text_config(backbone: PreTrainedModel) -> Any:
    return backbone.config.get_text_config(decoder=True)


def _eager_run(
    model: PreTrainedModel, backbone: PreTrainedModel, like: Tensor, kind: CacheKind
) -> tuple[Firings, CacheKind]:
    """One plain run with markers: classifies the masks and counts the sites.

    Fewer attentions than appends tell that the model attends in code of its own. A model that
    does not run with transformers' own cache is run with that of its own class.
    """
    seen, before = Firings(), marks(backbone)
    try:
        with markers_in(model, seen), watching(backbone, seen.watch):
            flat = _Flat(backbone, kind, seen)
            inputs, extra = _inputs(backbone, like, _BATCH, _TOKENS, 0)
            flat(*inputs, **extra)
    except KVQuantError:
        raise
    except Exception as error:
        if seen.masks and not seen.attends:  # its own code needs a mask of its own
            seen.appends = max(1, seen.appends)
            return seen, kind
        own = None if kind.own else own_cache(backbone, like)
        if own is None:
            raise not_running(model, error) from error
        return _eager_run(model, backbone, like, replace(kind, own=own))
    audit_firings(type(model).__name__, seen)
    states = attribute_states(backbone, like, before)
    seen.watch.users |= {state.owner: None for state in states}
    return seen, replace(kind, attributes=states)


def _export(
    model: PreTrainedModel,
    backbone: PreTrainedModel,
    like: Tensor,
    eager: Firings,
    kind: CacheKind,
) -> tuple[torch.export.ExportedProgram, list[Leaf]]:
    tracing = Firings(masks=eager.masks, replaying=True)
    two = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes: dict[str, Any] = dict.fromkeys(("hidden", "attention_mask", "position_ids"), two)
    shapes["past"] = Dim.DYNAMIC
    shapes |= dict.fromkeys(extra_inputs(backbone), two)

    def export() -> torch.export.ExportedProgram:
        with markers_in(model, tracing):
            return torch.export.export(
                _Flat(backbone, kind, tracing),
                *_inputs(backbone, like, _BATCH, _TOKENS, _PAST),
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )

    with export_errors(model):
        return _with_leaves(export, tracing, eager.watch, backbone, kind)


def _with_leaves(
    export: Callable[[], torch.export.ExportedProgram],
    tracing: Firings,
    watch: Watch,
    backbone: PreTrainedModel,
    kind: CacheKind,
) -> tuple[torch.export.ExportedProgram, list[Leaf]]:
    """Export with the watch's modules as leaves, and with those that the tracer fails in."""
    watch.traced = True
    while True:
        tracing.restart()
        try:
            with opaque(watch, kind) as leaves, watching(backbone, watch):
                return export(), leaves
        except Exception as error:
            if "data-dependent" not in str(error) or not watch.exclude():
                raise


def _own_attention(
    model: PreTrainedModel,
    backbone: PreTrainedModel,
    like: Tensor,
    kind: CacheKind,
    observer: Observer,
) -> tuple[fx.GraphModule, Firings]:
    """The marked graph of a model whose attention is code of its own."""
    step = _inputs(backbone, like, _BATCH, _TOKENS, _PAST)[0][:3]
    before = _inputs(backbone, like, _BATCH, _PAST, 0)[0][:3]
    with export_errors(model), attention_by(backbone, "eager"):
        caches = cache_inputs(backbone, kind, before)
        program = export_with_cache(backbone, kind, step, caches)
    return marked_graph(program, caches.layout, observer)


def _derived_keys(
    model: PreTrainedModel,
    backbone: PreTrainedModel,
    like: Tensor,
    eager: Firings,
    kind: CacheKind,
    observer: Observer,
) -> fx.GraphModule:
    """The marked graph of a model that computes keys and values from what it has cached."""
    step = _inputs(backbone, like, _BATCH, _TOKENS, _PAST)[0][:3]
    before = _inputs(backbone, like, _BATCH, _PAST, 0)[0][:3]
    tracing = Firings(masks=eager.masks, replaying=True)
    with export_errors(model):
        caches = cache_inputs(backbone, kind, before)

        def export() -> torch.export.ExportedProgram:
            with markers_in(model, tracing):
                return export_with_cache(backbone, kind, step, caches)

        program, leaves = _with_leaves(export, tracing, eager.watch, backbone, kind)
    gm = flat_graph(program, all_outputs=True)
    observer.graph("exported", gm)
    written_slices_as_values(gm)
    mark_appends(gm, caches.layout)
    call_leaves(gm, leaves)
    return gm
