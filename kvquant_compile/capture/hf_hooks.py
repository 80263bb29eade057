"""How markers get into a transformers model; the only module that touches its internals.

Tested with transformers 5.16 to 5.23. Public seams used: ``AttentionInterface``,
``AttentionMaskInterface``, ``DynamicCache`` and its layer classes. Not public, and therefore
confined to this file: ``config._attn_implementation`` (read and restored), and the contract of a
mask function, ``f(batch, head, query, key) -> bool tensor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvquant_compile.capture.capture_cache import Firings
from kvquant_compile.capture.failures import calling_line
from kvquant_compile.capture.markers import ATTEND, MASK
from kvquant_compile.capture.mask_kind import MaskKind, mask_kind
from kvquant_compile.errors import UnsupportedLayerError

INTERFACE = "kvquant_capture"
# Arguments of attention functions that do not change the result. Anything else is refused: a
# model once passed a bias that way, and dropping it was silently wrong.
_HARMLESS = frozenset(
    {"dropout", "position_ids", "cache_position", "use_cache", "return_dict"}
    | {"output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"}
)


_active: Firings = Firings()


def _attention_marker(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: Any = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    sinks = others.pop("s_aux", None)
    sinks = others.pop("sinks", None) if sinks is None else sinks
    selected = others.pop("indices", None)  # places of the only keys that are attended
    bias = others.pop("position_bias", None)  # joins the scores (inkling)
    layer = int(getattr(module, "layer_idx", None) or 0)
    _refuse_unknown(module, layer, others, sinks, bias, query)
    window = sliding_window[0] if isinstance(sliding_window, (tuple, list)) else sliding_window
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _active.attends += 1
    _refuse_bias(module, layer, attention_mask)
    _note_mask(attention_mask)
    _active.derived |= not any(key is k and value is v for k, v in _active.appended)
    out = ATTEND(
        query, key, value, attention_mask, sinks, layer,
        float(scale), float(softcap or 0.0), int(window or 0), bool(causal), None, selected, bias,
    )  # fmt: skip
    return out, None


def _note_mask(mask: Tensor | None) -> None:
    """Remember which masks are attended with; all of them where a model has changed one."""
    if mask is None or _active.replaying:
        return
    places = [i for i, made in enumerate(_active.made) if made is mask]
    _active.attended.update(places or range(len(_active.masks)))


def _refuse_bias(module: nn.Module, layer: int, mask: Tensor | None) -> None:
    """Masks that are numbers are computed by the model: they bias scores by what it knows."""
    if mask is not None and mask.dtype is not torch.bool:
        raise UnsupportedLayerError(
            "an attention layer cannot be captured",
            where=f"{type(module).__name__}, layer {layer}, {calling_line(module)}",
            why=f"it adds a tensor {list(mask.shape)} of its own to the scores instead of a causal"
            " mask, and such biases may depend on data",
            do="Report the model; only causal, sliding and chunked masks are supported.",
        )


def _refuse_unknown(
    module: nn.Module,
    layer: int,
    others: dict[str, Any],
    sinks: Tensor | None,
    bias: Tensor | None,
    query: Tensor,
) -> None:
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
    if sinks is not None and sinks.ndim != 1 and sinks.shape != (*query.shape[:3], 1):
        unknown.append(f"sinks of shape {list(sinks.shape)}")
    if bias is not None and bias.shape[:3] != query.shape[:3]:
        unknown.append(f"position_bias of shape {list(bias.shape)}")
    if unknown:
        raise UnsupportedLayerError(
            "an attention layer cannot be captured",
            where=f"{type(module).__name__}, layer {layer}, {calling_line(module)}",
            why=f"it passes {', '.join(unknown)} to the attention function, whose meaning is"
            " not known here",
            do="Report the model; guessing would give silently wrong attention.",
        )


def _mask_marker(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    kind = _next_kind(mask_function)
    past = kv_length - q_length
    mask = MASK(
        attention_mask, batch_size, q_length, past, kind.kind, kind.window, torch.device(device)
    )
    if not _active.replaying:
        _active.made.append(mask)
    return mask


def _next_kind(function: Callable[..., Tensor]) -> MaskKind:
    """Classify in the eager run; while tracing, tensors have no data, so replay the answers."""
    if _active.replaying:
        _active.replayed += 1
        return _active.masks[_active.replayed - 1]

    def visible(query: Tensor, key: Tensor) -> Tensor:
        zero = torch.zeros_like(query)
        return function(zero, zero, query, key)

    # A mask of another kind is recorded, not refused: first comes the question whether the
    # model is a decoder at all.
    _active.masks.append(mask_kind(visible))
    return _active.masks[-1]


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object of the model, sub-configurations after their parents."""
    found: list[Any] = []
    queue: list[Any] = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while queue:
        config = queue.pop(0)
        if config is None or any(config is other for other in found):
            continue
        found.append(config)
        queue += [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    return found


@contextmanager
def attention_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model attends with the named implementation inside the block; restored after it."""
    configs = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in configs:
            config._attn_implementation = implementation


@contextmanager
def markers_in(model: PreTrainedModel, seen: Firings) -> Iterator[None]:
    """Attention and masks of the model are markers inside the block; all is restored after it.

    The names stay registered, which changes no model. Not re-entrant and not thread-safe:
    transformers keeps one global table of attention functions.
    """
    global _active
    AttentionInterface.register(INTERFACE, _attention_marker)
    AttentionMaskInterface.register(INTERFACE, _mask_marker)
    previous, _active = _active, seen
    try:
        with attention_by(model, INTERFACE):
            yield
    finally:
        _active = previous
