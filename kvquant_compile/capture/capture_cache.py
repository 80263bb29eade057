"""The cache that a model is captured with: it marks appends, and keeps recurrent states.

Tested with transformers 5.16 to 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from kvquant_compile.capture.failures import definition_line
from kvquant_compile.capture.leaves import Watch, WatchedCache
from kvquant_compile.capture.markers import APPEND
from kvquant_compile.capture.mask_kind import MaskKind
from kvquant_compile.capture.own_cache import CacheKind, noting
from kvquant_compile.errors import UnsupportedModelError

# Layers without keys and values of their own; transformers before 5.20 has no DummyLayer.
KEYLESS_LAYERS = (getattr(cache_utils, "DummyLayer", LinearAttentionLayer), LinearAttentionLayer)

_HYBRID = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
_PLAIN_UPDATES: set[Any] = {DynamicLayer.update, DynamicSlidingWindowLayer.update}


@dataclass
class Firings:
    """What the markers saw during one run of the model; masks are classified in eager runs.

    Attributes:
        appends, attends: how often each fired.
        masks: what every mask means, attended with or not; models make some that they never use.
        made: the masks themselves, in an eager run.
        attended: places in ``masks`` of those that an attention was given.
        appended: what the appends gave back, in an eager run.
        derived: whether keys or values are attended that are computed from what a cache holds.
        forgetful: window of every cache layer that forgets what is outside of one, if that is
            narrower than the model's context.
        watch: the modules that keep a state.
        positions: whether positions of all tokens are kept beside keys and values.
        replaying, replayed: while tracing, the place of the next answer in ``masks``.
    """

    appends: int = 0
    attends: int = 0
    masks: list[MaskKind] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    attended: set[int] = field(default_factory=set)
    appended: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    derived: bool = False
    forgetful: dict[int, int] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    positions: bool = False
    replaying: bool = False
    replayed: int = 0

    def restart(self) -> None:
        """Before another trace."""
        self.appends = self.attends = self.replayed = 0
        self.appended.clear()


class CaptureLayer(DynamicLayer):
    """A cache layer that emits append markers and never windows; it holds no tensors."""

    def __init__(self, index: int, past: int, seen: Firings) -> None:
        DynamicLayer.__init__(self)
        self.index, self.past, self.seen, self.new = index, past, seen, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Mark the append; k [B, Hkv, S, D] and v [B, Hkv, S, Dv]."""
        self.seen.appends += 1
        self.new = key_states.shape[-2]
        whole = APPEND(key_states, value_states, self.index, self.past)
        self.seen.appended.append(whole)
        return whole

    def get_seq_length(self) -> int:
        """Tokens before and, once updated, in this call."""
        return self.past + self.new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover every cached token: windows stay in the mask."""
        return self.past + query_length, 0


class CaptureHybridLayer(CaptureLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """The same beside a recurrent state."""

    def __init__(self, index: int, past: int, seen: Firings, states: int) -> None:
        CaptureLayer.__init__(self, index, past, seen)
        LinearAttentionLayer.__init__(self, states)

    lazy_initialization = LinearAttentionLayer.lazy_initialization


class CaptureIndexedLayer(CaptureLayer, DynamicIndexedLayer):
    """The same beside the keys of an index, by which queries choose what they attend to."""

    def __init__(self, index: int, past: int, seen: Firings) -> None:
        DynamicIndexedLayer.__init__(self)
        CaptureLayer.__init__(self, index, past, seen)


class _MarkedAppends(DynamicCache):
    """What a cache of a model's own class does with keys and values while it is captured."""

    past: int
    seen: Firings

    def begin(self, past: int, seen: Firings) -> None:
        """Before a run with so many cached tokens."""
        self.past, self.seen = past, seen
        self.captured: dict[int, CaptureLayer] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See :class:`CaptureLayer`."""
        return self._layer(layer_idx).update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """See :class:`CaptureLayer`."""
        return self._layer(layer_idx).get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """See :class:`CaptureLayer`."""
        return self._layer(layer_idx).get_mask_sizes(query_length)

    def _layer(self, index: int) -> CaptureLayer:
        return self.captured.setdefault(index, CaptureLayer(index, self.past, self.seen))


def capture_cache(kind: CacheKind, past: int, seen: Firings) -> DynamicCache:
    """The model's own cache with every attention layer replaced by a :class:`CaptureLayer`.

    Layers with a recurrent state keep it, and so does a cache of a class of the model's own.

    Raises:
        UnsupportedModelError: a layer keeps another state than keys and values.
    """
    if kind.own is not None:
        methods = noting(kind.own, seen.watch.note)
        own: Any = type(kind.own.__name__, (_MarkedAppends, kind.own), methods)()
        own.begin(past, seen)
        return cast("DynamicCache", own)
    config = kind.config
    cache = WatchedCache(config=config)
    most = getattr(config, "max_position_embeddings", None) or float("inf")
    cache.watch = seen.watch
    for index, layer in enumerate(cache.layers):
        if type(layer) in KEYLESS_LAYERS:  # no keys and values of its own
            continue
        if isinstance(layer, _HYBRID):
            count = layer.number_of_states
            cache.layers[index] = CaptureHybridLayer(index, past, seen, count)
            continue
        if type(layer) is DynamicIndexedLayer:
            cache.layers[index] = CaptureIndexedLayer(index, past, seen)
            continue
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window < most:
            seen.forgetful[index] = int(layer.sliding_window)
        if getattr(type(layer), "update", None) not in _PLAIN_UPDATES:
            raise UnsupportedModelError(
                "the model cannot be captured",
                where=definition_line(type(layer)),
                why=f"its cache layer {index} is a {type(layer).__name__}, which keeps more than"
                " keys, values and a recurrent state (an index, or compressed keys)",
                do="Report the model; such caches are not supported.",
            )
        cache.layers[index] = CaptureLayer(index, past, seen)
    return cache
