"""Putting a program behind a model's own ``forward`` and ``generate``, and taking it out again.

Only instance attributes of the model change: the backbone's ``forward`` and, for transformers
models, ``_prepare_cache_for_generation`` and ``init_continuous_batching``. Class, config,
parameters, state dict and every other method stay the user's own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.embedding import embedded, extra_inputs
from kvquant_compile.errors import OptionError, UnsupportedModelError
from kvquant_compile.logs import logger
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.chunks import in_chunks
from kvquant_compile.runtime.generation import prepare_cache, refuse_continuous_batching
from kvquant_compile.runtime.given_mask import padding_of
from kvquant_compile.runtime.handwritten import handwritten_forward, shelve, unshelve
from kvquant_compile.runtime.installed import ATTRIBUTE, Installed, installed
from kvquant_compile.runtime.program import Program
from kvquant_compile.runtime.switched import follow_adapters

_log = logger("runtime")
# Arguments of a backbone that the program reads, or that change no hidden state.
_READ = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
    "return_dict", "cache_position", "logits_to_keep", "labels", "num_items_in_batch",
}  # fmt: skip


def output_type(captured: Captured) -> type | None:
    """The class of what a transformers backbone returns, found by calling it on one token."""
    if captured.convention != "transformers":
        return None
    ids = torch.zeros(1, 1, dtype=torch.int64, device=captured.device)
    with torch.no_grad():
        found = type(captured.backbone(input_ids=ids, use_cache=False))
    if captured.caches is not None:
        captured.caches.forget()
    return found


def install(model: nn.Module, state: Installed, output_type: type | None) -> None:
    """Put the program behind the model; ``output_type`` is what its backbone returns."""
    backbone: Any = state.captured.backbone
    network: Any = model
    for module, name in state.replaced():
        if name in module.__dict__:
            state.before[name] = module.__dict__[name]
    if state.captured.convention == "transformers":
        assert output_type is not None
        backbone.forward = _backbone_forward(backbone, state, output_type)
        if hasattr(model, "_prepare_cache_for_generation"):
            network._prepare_cache_for_generation = prepare_cache(
                network._prepare_cache_for_generation, state
            )
        if hasattr(model, "init_continuous_batching"):
            network.init_continuous_batching = refuse_continuous_batching
    else:
        backbone.forward = handwritten_forward(backbone, state)
        shelve(state)
    for module in (model, backbone):
        module.__dict__[ATTRIBUTE] = state
    _log.info("%s runs %r", type(model).__name__, state.program)


def uninstall(model: nn.Module) -> None:
    """Give the model its own behaviour back."""
    state = installed(model)
    unshelve(state)
    for module, name in state.replaced():
        module.__dict__.pop(name, None)
        if name in state.before:
            module.__dict__[name] = state.before[name]
        module.__dict__.pop(ATTRIBUTE, None)
    _log.info("%s runs as it was", type(model).__name__)


def _backbone_forward(
    backbone: nn.Module, state: Installed, output_type: type
) -> Callable[..., Any]:
    original = backbone.forward
    signature = inspect.signature(original)
    has_cache = "past_key_values" in {part.name for part in dataclasses.fields(output_type)}

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = _given(signature, args, kwargs)
        cache = given.get("past_key_values")
        reason = _why_original(backbone, state, given, cache)
        if reason is not None:
            if reason:
                state.warn_once(reason)
            return original(*args, **kwargs)
        follow_adapters(state, _tokens(given).shape[1])
        _refuse_unsupported(backbone, given)
        _refuse_unread(backbone, signature, given)
        if cache is None and not _wants_cache(backbone, given):
            _refuse_packed(given)
        owned = cache if cache is not None else state.program.new_cache()
        hidden = _run_backbone(backbone, state, given, owned)
        result = output_type(last_hidden_state=hidden)
        if has_cache and (cache is not None or _wants_cache(backbone, given)):
            result.past_key_values = owned
        return result if given.get("return_dict", True) is not False else result.to_tuple()

    return forward


def _given(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name."""
    given = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def _wants_cache(backbone: Any, given: dict[str, Any]) -> bool:
    use_cache = given.get("use_cache")
    return bool(backbone.config.use_cache if use_cache is None else use_cache)


def _why_original(
    backbone: nn.Module, state: Installed, given: dict[str, Any], cache: Any
) -> str | None:
    """Why a call must go to the original forward: a reason to warn about, "" for a silent one
    (nothing the user expects to be compressed), None when the program runs."""
    if isinstance(cache, QuantizedCache):
        return None
    if cache is not None:
        return (
            f"a {type(cache).__name__} was passed, so this call runs the original "
            "full-precision model; pass no cache, or one made by the optimised model"
        )
    if backbone.training:
        return "the model is in training mode and runs unquantised; call model.eval()"
    if not _wants_cache(backbone, given) and not state.attend_quantized:
        return ""
    return None


def _refuse_unsupported(backbone: Any, given: dict[str, Any]) -> None:
    """Raise for outputs that the program does not have, asked for by the call or the config."""
    wanted = {name for name, value in given.items() if name.startswith("output_") and value}
    for name in ("output_attentions", "output_hidden_states"):
        if given.get(name) is None and getattr(backbone.config, name, False):
            wanted.add(name)
    for name in sorted(wanted):
        raise OptionError(
            f"{name}=True on an optimised model",
            why="the fused graph never materialises them",
            do="Call kvquant_compile.restore(model) to inspect the original.",
        )


def _refuse_unread(backbone: Any, signature: inspect.Signature, given: dict[str, Any]) -> None:
    """Raise for inputs that the program does not read and the original might: encoder states,
    token types, the features of images."""
    also = extra_inputs(backbone)
    for name, value in given.items():
        known = signature.parameters.get(name)
        read = name in _READ or name in also
        nothing = value is None or value is False or (known and value is known.default)
        if read or nothing or name.startswith("output_"):
            continue
        raise OptionError(
            f"{name} given to an optimised model",
            where=type(backbone).__name__,
            why="the graph was captured without it, so that it would be ignored",
            do="Leave it out, or call kvquant_compile.restore(model) first.",
        )


def _refuse_packed(given: dict[str, Any]) -> None:
    """Raise where the original would take a row for several sequences: without a cache or a mask,
    and with positions that jump."""
    positions = given.get("position_ids")
    if positions is None or given.get("attention_mask") is not None or positions.ndim != 2:
        return
    if bool((positions.diff(dim=1) != 1).any()):
        raise OptionError(
            "position_ids that jump, with use_cache=False, on an optimised model",
            why="they mean several sequences in one row, which the pages do not keep apart",
            do="Pass one sequence per row, padded.",
        )


def _tokens(given: dict[str, Any]) -> Tensor:
    return given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]


def _run_backbone(
    backbone: Any, state: Installed, given: dict[str, Any], cache: QuantizedCache
) -> Tensor:
    """The last hidden state [B, S, width] of a step, which is run in parts where it is long."""
    batch, steps = _tokens(given).shape[:2]
    past = cache.columns
    positions = _positions(given.get("position_ids"), batch, steps, cache)
    mask = padding_of(given.get("attention_mask"), past)

    def run(span: slice) -> Tensor:
        fed = _fed(backbone, given, span)
        _check_placement(state.program, fed["hidden"])
        here = positions[:, span]
        seen = mask if mask is None or span.stop == steps else mask[:, : past + span.stop]
        inputs = {**fed, "position_ids": here, "attention_mask": seen, "past": cache.columns}
        return state.decode.run(inputs, cache, here, seen, not state.attend_quantized)

    return in_chunks(run, steps, state.prefill_chunk, cache)


def _fed(backbone: Any, given: dict[str, Any], span: slice) -> dict[str, Tensor]:
    """The inputs that come from a span of tokens, embedded already or not."""
    if given.get("inputs_embeds") is None:
        return embedded(backbone, given["input_ids"][:, span])
    fed = {"hidden": given["inputs_embeds"][:, span]}
    for name in extra_inputs(backbone):
        if given.get(name) is None:
            raise OptionError(
                f"inputs_embeds without {name} on an optimised model",
                why="layers are fed more of a token than its embedding",
                do="Pass input_ids, or both.",
            )
        fed[name] = given[name][:, span]
    return fed


def _positions(given: Tensor | None, batch: int, steps: int, cache: QuantizedCache) -> Tensor:
    if given is None:
        given = torch.arange(cache.columns, cache.columns + steps, device=cache.device)[None]
    if given.ndim != 2:
        raise OptionError(
            f"position_ids with {given.ndim} axes",
            why="keys are rotated on reading by one position per token",
            do="Pass position_ids of shape [batch, tokens].",
        )
    return given.to(cache.device).expand(batch, steps)


def _check_placement(program: Program, hidden: Tensor) -> None:
    if hidden.device != program.device or hidden.dtype != program.dtype:
        raise UnsupportedModelError(
            "the model was moved after it was optimised",
            why=f"the graph was captured for {program.dtype} on {program.device}, and this call "
            f"brings {hidden.dtype} on {hidden.device}",
            do="Call kvquant_compile.restore(model), move it, and optimize again.",
        )
