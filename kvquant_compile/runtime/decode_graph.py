"""Decode steps as device graphs: one token per sequence, captured once and then replayed.

A cache's first decode step on its storage runs eagerly; it compiles kernels and makes constants.
The second is captured and from then on every step is a copy of its inputs, one replay and a copy
of its output. Lengths, slots and positions are computed in the graph from the cache's own tensors,
which stay where they are until ``QuantizedCache.storage`` is replaced; then the same begins anew.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvquant_compile.capture.leaves import Leaf
from kvquant_compile.lowering.triton.prepared import page_addresses
from kvquant_compile.passes.rewrite import CONSTANT_PREFIX
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.graph_backend import Body, CudaGraphs, GraphBackend
from kvquant_compile.runtime.program import Program

# Graphs of a model alive at a time, a few MB each; further caches decode eagerly until others die.
MOST_GRAPHS = 64
# Python numbers and tensors of growing shape: a graph would keep those of its capture.
_CHANGING = ("past", "attention_mask")
_ON_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class StepGraph:
    """One captured decode step of a program on one cache's storage.

    Args:
        program: what to capture.
        cache: it must be ready for a token more (``QuantizedCache.admit``).
        inputs: the captured graph's own inputs, tensors [B, 1, ...].
        positions: int [B, 1].
        exact_chunk: as of ``Program.run``.
        backend: what captures.

    Raises:
        Exception: the capture failed; program and cache are as they were.
    """

    def __init__(
        self,
        program: Program,
        cache: QuantizedCache,
        inputs: Mapping[str, Any],
        positions: Tensor,
        exact_chunk: bool,
        backend: GraphBackend,
    ) -> None:
        own = positions.clone(memory_format=torch.contiguous_format)
        self._positions = own
        self._inputs = {
            name: own if inputs[name] is positions else inputs[name].clone()
            for name in program.inputs
            if name in inputs
        }
        self._weights = _weights(program)
        self._addresses = _addresses(self._weights)
        # Kernels find pages through these; a graph keeps no reference to what it reads.
        self._kept = [page_addresses(layer.slabs) for layer in cache.pages]
        self._replay = backend.capture(self._body(program, cache, exact_chunk), program.device)

    def _body(self, program: Program, cache: QuantizedCache, exact_chunk: bool) -> Body:
        inputs, positions = self._inputs, self._positions

        def body() -> Tensor:
            step = cache.place(positions)
            output = program.compute(inputs, cache, step, exact_chunk)
            cache.advance(step)
            return output

        return body

    def stale(self) -> bool:
        """Whether a weight has moved since, as ``model.to`` does."""
        return _addresses(self._weights) != self._addresses

    def run(self, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
        """Replay with other inputs; the caller counts the token in (``QuantizedCache.count``).

        Returns:
            The graph's output, a tensor of its own.
        """
        self._positions.copy_(positions)
        for name, tensor in self._inputs.items():
            if tensor is not self._positions:
                tensor.copy_(inputs[name])
        return self._replay().clone()


@dataclass(eq=False)
class _Seen:
    """A cache's latest storage, and the circumstances of its latest decode step."""

    storage: object
    circumstances: Hashable
    graph: StepGraph | None = None


class DecodeGraphs:
    """Runs a program's steps: decode steps as device graphs where possible, all others eagerly.

    Args:
        program: what runs.
        warn: called with a reason why decode steps stay eager.
        backend: what captures; CUDA graphs by default.

    Attributes:
        failure: why a capture failed, after which none is tried; empty while none did.
    """

    def __init__(
        self, program: Program, warn: Callable[[str], None], backend: GraphBackend | None = None
    ) -> None:
        self.program, self.failure = program, ""
        self._warn, self._enabled = warn, True
        self._backend = backend or CudaGraphs()
        self._refusal = self._backend.refusal(program) or _refusal(program)
        self._seen: weakref.WeakKeyDictionary[QuantizedCache, _Seen] = weakref.WeakKeyDictionary()
        self._turn = threading.Lock()  # of one thread to look up, capture or replay

    @property
    def enabled(self) -> bool:
        """Whether graphs are used where they can be. Setting it drops captured graphs and forgets
        a failure."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled, self.failure = value, ""
        self._seen.clear()
        self._backend.release()

    @property
    def refusal(self) -> str:
        """Why decode steps run eagerly; empty where they do not."""
        if not self._enabled:
            return "switched off"
        return self._refusal or self.failure

    def run(
        self,
        inputs: Mapping[str, Any],
        cache: QuantizedCache,
        positions: Tensor,
        attention_mask: Tensor | None,
        exact_chunk: bool,
    ) -> Tensor:
        """One step; as :meth:`Program.run`, which defines what it does."""
        batch, steps = positions.shape
        real = cache.admit(batch, steps, attention_mask)
        graph = None
        if steps == 1 and real is None and self._applies():
            with self._turn:
                graph = self._graph(cache, inputs, positions, exact_chunk)
        if graph is None:
            return self.program.proceed(inputs, cache, positions, real, exact_chunk)
        with self._turn:  # graphs share memory, the result included until it is copied
            output = graph.run(inputs, positions)
        cache.count(1)
        return output

    def _applies(self) -> bool:
        """Whether a decode step may be a graph under the present modes of torch."""
        if self.refusal:
            if self.program.device.type != "cpu" and self._enabled:
                self._warn(f"decode steps run without a CUDA graph: {self.refusal}")
            return False
        if torch.is_grad_enabled():
            self._warn(
                "decode steps run without a CUDA graph, because gradients are enabled; call the "
                "model under torch.no_grad()"
            )
            return False
        kind = self.program.device.type
        return not (torch.is_autocast_enabled(kind) or torch.compiler.is_compiling())

    def _graph(
        self,
        cache: QuantizedCache,
        inputs: Mapping[str, Any],
        positions: Tensor,
        exact_chunk: bool,
    ) -> StepGraph | None:
        """The graph of this step; None where it has to run eagerly."""
        context = self._backend.context(self.program.device)
        if context is None:
            return None
        circumstances = (context, exact_chunk)
        seen = self._seen.get(cache)
        known = seen is not None and seen.storage is cache.storage
        if seen is None or not known or seen.circumstances != circumstances:
            self._seen[cache] = _Seen(cache.storage, circumstances)
            return None
        if seen.graph is not None and seen.graph.stale():
            seen.graph = None
        elif seen.graph is None and self._captured() < MOST_GRAPHS:
            seen.graph = self._capture(cache, inputs, positions, exact_chunk)
        return seen.graph

    def _captured(self) -> int:
        return sum(seen.graph is not None for seen in self._seen.values())

    def _capture(
        self,
        cache: QuantizedCache,
        inputs: Mapping[str, Any],
        positions: Tensor,
        exact_chunk: bool,
    ) -> StepGraph | None:
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            try:
                return StepGraph(self.program, cache, inputs, positions, exact_chunk, self._backend)
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                self.failure = f"its capture failed: {type(error).__name__}: {reason}"
                self._warn(f"decode steps run without a CUDA graph: {self.failure}")
                return None


def _refusal(program: Program) -> str:
    """What in the program itself rules a graph out."""
    if any(isinstance(module, Leaf) for module in program.graph_module.children()):
        return "modules of the model run as they are: with a recurrent state, or control flow"
    used = [name for name in _CHANGING if name in program.inputs]
    if used:
        return f"the model computes with {' and '.join(used)} on the host"
    places = {str(tensor.device) for tensor in _weights(program)} - {str(program.device)}
    if places:
        return f"weights lie on {', '.join(sorted(places))} too"
    waiting = [node for node in program.graph_module.graph.nodes if _waits(node)]
    if waiting:
        return f"the model itself waits for the device, in {waiting[0].target}"
    return ""


def _waits(node: fx.Node) -> bool:
    """Whether a node's result has to be known on the host, or its shape depends on data."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is torch.ops.aten.index.Tensor:  # depends on data for masks only
        indices: Any = node.args[1]
        values = [index.meta.get("val") for index in indices if isinstance(index, fx.Node)]
        return any(v is not None and v.dtype in (torch.bool, torch.uint8) for v in values)
    return not _ON_HOST.isdisjoint(node.target.tags)


def _weights(program: Program) -> list[Tensor]:
    """Everything of the model's own that the graph reads."""
    module = program.graph_module
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    return [tensor for name, tensor in named if not name.startswith(CONSTANT_PREFIX)]


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
