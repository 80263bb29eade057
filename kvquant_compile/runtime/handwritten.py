"""The installed ``forward`` of hand-written decoders, one for each calling convention.

The signature stays the model's own. What differs between the conventions is only where a call's
quantised cache is: it is the ``past`` that is passed around, it belongs to the model, or it hangs
on the caller's cache object, whose own tensors are replaced by empty ones of the same shape.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvquant_compile.capture.decoder import Functional
from kvquant_compile.capture.state import CacheLeaf, at, is_saved, put
from kvquant_compile.capture.stateful import CacheObject, StartPosition, Stateful
from kvquant_compile.errors import CacheError, OptionError
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.chunks import in_chunks
from kvquant_compile.runtime.installed import ATTRIBUTE, Installed
from kvquant_compile.runtime.switched import follow_adapters

_TRAINING = "the model is in training mode and runs unquantised"


def handwritten_forward(module: nn.Module, state: Installed) -> Callable[..., Any]:
    """The forward that replaces a decoder's own."""
    decoder = state.captured.decoder
    kinds: dict[type, Callable[..., Any]] = {
        Functional: _functional, StartPosition: _start_position, CacheObject: _cache_object,
    }  # fmt: skip
    original = module.forward
    names = list(inspect.signature(original).parameters)[:2]

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        ids, past = _inputs(names, args, kwargs)
        if module.training:
            state.warn_once(_TRAINING)
            unshelve(state)
            return original(*args, **kwargs)
        run = kinds[type(decoder)]
        return run(state, ids, past, lambda: original(*args, **kwargs))

    return forward


def _inputs(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """ids and past, however they are passed.

    Raises:
        OptionError: something else is passed too.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    extra = [name for name in given if name not in names and given[name] is not None]
    if len(args) > len(names) or extra:
        raise OptionError(
            "more inputs than the model was optimised for",
            why=f"it was captured with {' and '.join(names)}"
            + (f", and {', '.join(extra)} is given too" if extra else ""),
            do="Call kvquant_compile.restore(model) to run the original.",
        )
    return given.get(names[0]), given.get(names[1]) if len(names) > 1 else None


def _run(state: Installed, ids: Tensor, cache: QuantizedCache) -> Tensor:
    follow_adapters(state, ids.shape[1])

    def run(span: slice) -> Tensor:
        part, start = ids[:, span], cache.columns
        positions = torch.arange(start, start + part.shape[1], device=cache.device)
        inputs = {"ids": part, "past": start}
        places = positions.expand(part.shape)
        return state.decode.run(inputs, cache, places, None, not state.attend_quantized)

    return in_chunks(run, ids.shape[1], state.prefill_chunk, cache)


def _functional(
    state: Installed, ids: Tensor, past: Any, original: Callable[[], Any]
) -> tuple[Tensor, Any]:
    """``past`` is None, an empty list or a QuantizedCache."""
    if past is not None and not isinstance(past, QuantizedCache) and _holds_tokens(past):
        state.warn_once(
            "a list of full-precision keys and values was passed, so this call runs the "
            "original model; start from past=None to use the quantised cache"
        )
        return original()
    cache = past if isinstance(past, QuantizedCache) else state.program.new_cache()
    return _run(state, ids, cache), cache


def _holds_tokens(past: Any) -> bool:
    return any(isinstance(x, Tensor) and x.numel() for x in pytree.tree_leaves(past))


def _start_position(state: Installed, ids: Tensor, past: Any, original: Callable[[], Any]) -> Any:
    """The model's one cache; a start before its end forgets what is behind it."""
    decoder = _stateful(state)
    cache = state.own_cache
    if cache is None:
        cache = state.own_cache = state.program.new_cache()
    start = _start_of(past, ids.shape[1])
    if start == 0:
        cache.reset()
    _rewind(cache, start)
    return decoder.answer(past, _run(state, ids, cache))


def _start_of(past: Any, steps: int) -> int:
    """The first position of a step.

    Raises:
        CacheError: positions are not consecutive.
    """
    if not isinstance(past, Tensor):
        return int(past or 0)
    places = past.reshape(-1)
    start = int(places[0])
    if len(places) != steps or int(places[-1]) != start + steps - 1:
        raise CacheError(
            "positions that are not consecutive",
            why=f"{len(places)} of them, from {start} to {int(places[-1])}, for {steps} tokens",
            do="Pass the positions of the step's tokens, one after the other.",
        )
    return start


def _rewind(cache: QuantizedCache, start: int) -> None:
    """Forget what is cached from ``start`` on.

    Raises:
        CacheError: less is cached.
    """
    if start > cache.columns:
        raise CacheError(
            f"a step at position {start} does not continue the cache",
            why=f"it holds {cache.columns} tokens",
            do="Start at position 0, or where the last step ended.",
        )
    cache.crop(start - cache.columns)


def _cache_object(state: Installed, ids: Tensor, past: Any, original: Callable[[], Any]) -> Any:
    """The quantised cache that hangs on the caller's cache object, a new one on an empty object."""
    decoder = _stateful(state)
    cache, length = _attached(past), cached_tokens(decoder, past)
    if cache is None:
        if length:
            state.warn_once(
                "a cache object with full-precision keys and values was passed, so this call runs"
                " the original model; start from an empty one to use the quantised cache"
            )
            return original()
        cache = state.program.new_cache()
        _attach(past, cache)
    elif length == 0:
        cache.reset()
    _rewind(cache, length)
    logits = _run(state, ids, cache)
    _stand_in(decoder, past, cache)
    return decoder.answer(past, logits)


def cached_tokens(decoder: Stateful, past: Any) -> int:
    """Tokens that a cache object says it holds."""
    state = decoder.state
    for path in (*state.counters, *state.counting_tensors):
        count = at(past, path)
        if count is not None:
            return int(count)
    leaf = decoder.leaves[0]
    tensor = at(past, leaf.path)
    grown = isinstance(tensor, Tensor) and tensor.ndim == 4 and not leaf.capacity
    return int(tensor.shape[leaf.axis]) if grown else 0


def _stateful(state: Installed) -> Stateful:
    decoder = state.captured.decoder
    assert isinstance(decoder, Stateful)
    return decoder


def _holder(past: Any) -> Any:
    """The object that a cache object's attribute can be set on."""
    while isinstance(past, (list, tuple)) and past:
        past = past[0]
    return past


def _attached(past: Any) -> QuantizedCache | None:
    holder = _holder(past)
    if isinstance(holder, dict):
        return holder.get(ATTRIBUTE)
    return getattr(holder, "__dict__", {}).get(ATTRIBUTE)


def _attach(past: Any, cache: QuantizedCache) -> None:
    holder = _holder(past)
    if isinstance(holder, dict):
        holder[ATTRIBUTE] = cache
    elif hasattr(holder, "__dict__"):
        holder.__dict__[ATTRIBUTE] = cache
    else:
        raise OptionError(
            f"a {type(past).__name__} cannot carry a quantised cache",
            why="no attribute can be set on it",
            do="Give the class a __dict__ (no __slots__).",
        )


def _stand_in(decoder: Stateful, past: Any, cache: QuantizedCache) -> None:
    """Leave shapes without memory, and the counts, where the model would leave its tensors."""
    for leaf, shape in zip(decoder.leaves, decoder.shapes, strict=True):
        size = [cache.batch, *shape[1:]]
        if not leaf.capacity:
            size[leaf.axis] = cache.columns
        if _has_place(past, leaf.path):
            put(past, leaf.path, torch.empty(size, dtype=cache.dtype, device="meta"))
    for path in decoder.state.counters:
        if _has_place(past, path):
            put(past, path, cache.columns)
    for path in decoder.state.counting_tensors:
        counter = at(past, path)
        if isinstance(counter, Tensor):
            counter.fill_(cache.columns)


def _has_place(past: Any, path: Any) -> bool:
    *before, (_, key) = path
    owner = at(past, tuple(before))
    if isinstance(owner, (list, tuple)):
        return isinstance(key, int) and key <= len(owner)
    return owner is not None


def shelve(state: Installed) -> None:
    """Free the memory of cache tensors that the model owns; shapes stay, saved buffers too."""
    for leaf in _owned(state):
        tensor = at(state.captured.model, leaf.path)
        if not is_saved(state.captured.model, leaf.path):
            put(state.captured.model, leaf.path, tensor.new_zeros(()).expand(tensor.shape))


def unshelve(state: Installed) -> None:
    """Give the model its cache tensors back, empty."""
    for leaf in _owned(state):
        tensor = at(state.captured.model, leaf.path)
        if tensor.stride() == (0,) * tensor.ndim:
            put(state.captured.model, leaf.path, torch.zeros_like(tensor).contiguous())


def _owned(state: Installed) -> Sequence[CacheLeaf]:
    decoder = state.captured.decoder
    return decoder.leaves if isinstance(decoder, StartPosition) else ()
