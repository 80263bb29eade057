"""The cache that a model takes: transformers' own, or one of a class that the model brings along.

A class of a model's own is accepted where it only adds to transformers' dynamic cache: keys and
values go through the inherited ``update``, and what it adds are methods that give and take states
of a fixed size, one row per sequence. Modules that call these are leaves with a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import getattr_static
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kvquant_compile.capture.attribute_states import AttributeState, kept_in
from kvquant_compile.capture.failures import definition_line
from kvquant_compile.capture.state import Path, places
from kvquant_compile.errors import UnsupportedModelError

# What such a class may do in its own way: nothing of it is asked for here.
_FREE = {"crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"}
_LAYERS = ("attribute", "layers")


@dataclass(frozen=True)
class CacheKind:
    """How a model's cache is made.

    Attributes:
        config: of the text decoder, by which transformers' own cache has its layers.
        own: the class that the model brings along, if it takes no other.
        attributes: where its modules keep states that are in no cache.
    """

    config: Any
    own: type[DynamicCache] | None = None
    attributes: tuple[AttributeState, ...] = ()

    def new(self) -> DynamicCache:
        """An empty cache for the original model, whose attributes forget what they hold."""
        self.forget()
        return self.new_states()

    def forget(self) -> None:
        """Make attributes hold what they do before the first token."""
        for state in self.attributes:
            state.set(None)

    def new_states(self) -> DynamicCache:
        """An empty cache for leaves."""
        return DynamicCache(config=self.config) if self.own is None else self.own()


def own_states(cache: Cache | None) -> list[tuple[Path, Tensor]]:
    """The tensors [B, ...] that a cache holds beside what transformers' own layers do: those of a
    model's own class, and what is kept for us."""
    if cache is None or (type(cache) is DynamicCache and not kept_in(cache)):
        return []
    return [(path, value) for path, value in _own_places(cache) if isinstance(value, Tensor)]


def _own_places(cache: Cache) -> Iterator[tuple[Path, Any]]:
    return ((path, value) for path, value in places(cache) if path[0] != _LAYERS)


def state_methods(own: type[DynamicCache]) -> list[str]:
    """The methods that a class adds to transformers' dynamic cache, by name."""
    added = {name for kind in own.__mro__ for name in vars(kind)} - set(dir(DynamicCache))
    return sorted(name for name in added if callable(getattr(own, name)))


def own_cache(backbone: PreTrainedModel, like: Tensor) -> type[DynamicCache] | None:
    """The class of the cache that a backbone makes for itself; None for transformers' own.

    Raises:
        UnsupportedModelError: it keeps its states in a way that is not understood.
    """
    try:
        made = type(_run(backbone, like, 1, 2))
    except Exception:  # it does not run at all: the error at hand says more
        return None
    if made.__module__ == DynamicCache.__module__:
        return None
    why = _not_added(made) or _not_fixed(backbone, like)
    if why:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} cannot be captured",
            where=definition_line(made),
            why=f"it keeps its cache in a class of its own, {made.__name__}, which {why}",
            do="Report the model; such caches are not supported.",
        )
    return cast("type[DynamicCache]", made)


def _run(backbone: PreTrainedModel, like: Tensor, batch: int, tokens: int) -> Cache:
    """The cache that the backbone makes and fills."""
    width = backbone.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, tokens, width, generator=generator).to(like)
    cache: Cache = backbone(inputs_embeds=hidden, use_cache=True).past_key_values
    return cache


def _not_added(made: type) -> str:
    """How a class differs from transformers' dynamic cache with something added; or nothing."""
    if not issubclass(made, DynamicCache):
        return "is no DynamicCache"
    try:
        empty = made()
    except Exception as error:
        return f"cannot be made empty: {error}"
    if empty.layers or empty.layer_class_to_replicate is not DynamicLayer:
        return "has layers of another kind"
    for name in sorted(set(dir(DynamicCache)) - _FREE):
        changed = getattr_static(made, name) is not getattr_static(DynamicCache, name)
        if changed and callable(getattr(made, name)) and not name.startswith("__"):
            return f"has a method {name} of its own"
    return ""


def _not_fixed(backbone: PreTrainedModel, like: Tensor) -> str:
    """How states differ from tensors of one row per sequence, of a size that no token changes."""
    first, longer, wider = (
        dict(_own_places(_run(backbone, like, *size))) for size in ((2, 5), (2, 6), (3, 5))
    )
    if not first.keys() == longer.keys() == wider.keys():
        return "holds more with more tokens"
    for path, value in first.items():
        name = ".".join(str(key) for _, key in path)
        if not isinstance(value, Tensor):
            if value != longer[path]:
                return f"counts tokens in {name}"
        elif value.shape != longer[path].shape:
            return f"holds a tensor {name} that grows"
        elif not value.ndim or wider[path].shape != (3, *value.shape[1:]) or len(value) != 2:
            return f"holds a tensor {name} that has not one row per sequence"
    if not any(isinstance(value, Tensor) for value in first.values()):
        return "holds no tensors beside keys and values"
    return ""


def noting(own: type[DynamicCache], note: Callable[[], None]) -> dict[str, Callable[..., Any]]:
    """The methods of :func:`state_methods`, which call ``note`` first."""

    def noted(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            note()
            return getattr(own, name)(self, *args, **kwargs)

        return method

    return {name: noted(name) for name in state_methods(own)}
