"""The two ops as functions of an exported graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kvquant_compile.export.attend_step import Attention, attender
from kvquant_compile.export.cache_steps import LayerStore, appender
from kvquant_compile.export.codec_steps import Emit, Function
from kvquant_compile.export.step import Cache


class FunctionOps:
    """Emits ``append`` and ``attend``; see :class:`kvquant_compile.export.step.CacheOps`.

    Args:
        emit: runs a function, or puts a node for it into a graph.
    """

    def __init__(self, emit: Emit) -> None:
        self.emit = emit

    def append(
        self,
        store: LayerStore,
        step: tuple[Tensor, Tensor, Tensor],
        cache: Cache,
        constants: Mapping[str, Tensor],
    ) -> Cache:
        """The cache with the step in it."""
        pages, sinks = self._call(appender(store), (*step, *cache), constants)
        return pages, sinks

    def attend(
        self,
        store: LayerStore,
        site: Attention,
        step: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        cache: Cache,
        constants: Mapping[str, Tensor],
    ) -> Tensor:
        """Attention over the cache and the step."""
        return self._call(attender(store, site), (*step, *cache), constants)[0]

    def _call(
        self, function: Function, tensors: tuple[Tensor, ...], constants: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The inputs after the tensors are constants, found by name."""
        names = [x.name for x in function.signature.inputs[len(tensors) :]]
        return self.emit(function, [*tensors, *(constants[name] for name in names)])
