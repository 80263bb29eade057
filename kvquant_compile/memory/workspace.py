"""What steps need beside what they leave behind: measured on the model itself.

A step's intermediate results grow with its tokens and hardly with those before it (attention reads
the cache block by block), so two short steps give the line on which longer ones lie. They run on a
cache with a made-up history, long enough that attention reads blocks of full size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.lowering.attend import BLOCK_PAGES
from kvquant_compile.lowering.triton.prefill import BLOCK_TOKENS
from kvquant_compile.memory.allocated import Allocated, allocated
from kvquant_compile.memory.formulas import BATCH, CONTEXT
from kvquant_compile.runtime.cache import QuantizedCache
from kvquant_compile.runtime.installed import Installed, installed
from kvquant_compile.runtime.states import recurrent_bytes

# Steps of up to the second are measured as they are, longer ones lie on the line of both: here
# every inner loop of the ops has tiles of full size.
PROBES = (4096, 6144)
FEW = 64


@dataclass(frozen=True)
class Steps:
    """Steps of equal length.

    Attributes:
        tokens: of each, an expression in T.
        starts: tokens before each of them, of the first few.
    """

    tokens: sympy.Expr
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Workspace:
    """Bytes beside cache and weights.

    Attributes:
        formula: in T and B.
        kept: made at the first step and kept, such as constants of kernels.
        states: of a sequence's recurrent states.
    """

    formula: sympy.Expr
    kept: int = 0
    states: int = 0


def steps_of(context: int, prompt: int | None, chunk: int | None) -> list[Steps]:
    """The longest steps of a sequence whose prompt is fed in chunks.

    Args:
        context: tokens in the end.
        prompt: tokens before the first generated one; None: all.
        chunk: most tokens of a step; None for no limit.
    """
    length = context if prompt is None else min(prompt, context)
    fed = CONTEXT if prompt is None else sympy.Integer(length)
    answer = [Steps(sympy.Integer(1), (length,))] if length < context else []
    if chunk is None or length <= chunk:
        return [Steps(fed, (0,)), *answer]
    whole, part = sympy.Integer(chunk), length % chunk
    starts = tuple(range(chunk, length - chunk + 1, chunk))[:FEW]
    found = [Steps(whole, (0,)), *([Steps(whole, starts)] if starts else [])]
    last = fed - chunk if not starts else sympy.Integer(part)
    return found + ([Steps(last, (length - part,))] if part else [])


def measure(model: nn.Module, context: int, batch: int, prompt: int | None) -> Workspace:
    """Workspace of an optimised model for a context of so many tokens.

    Args:
        model: an optimised model; a few steps of up to 6144 tokens run on it.
        context: tokens of a sequence in the end.
        batch: sequences; where these are many, fewer are run.
        prompt: tokens before the first generated one; None: all.
    """
    state = installed(model)
    recurrent = state.program.new_cache().states is not None
    steps = steps_of(context, prompt, None if recurrent else state.prefill_chunk)
    warm = _Probe(model, state, batch, 1, 0)
    kept = warm.run().kept  # compiles kernels, makes constants
    lines = [_line(model, state, batch, context, found) for found in steps]
    return Workspace(BATCH * sympy.Max(*lines), kept, warm.states)


def _line(model: nn.Module, state: Installed, batch: int, context: int, steps: Steps) -> sympy.Expr:
    """Bytes of one sequence's step, an expression in T as its tokens are."""
    on_cpu = state.program.device.type == "cpu"
    # The torch path holds a block of the history until it has read the next one.
    block, held = (BLOCK_PAGES * PAGE_TOKENS, 2) if on_cpu else (BLOCK_TOKENS, 1)
    # Attention needs masks for the block in which a history ends, if not with the block.
    history = min(max(steps.starts), held * block + max(start % block for start in steps.starts))
    tokens = steps.tokens
    longest = int(tokens.subs(CONTEXT, context))
    points = [longest] if longest <= PROBES[1] else list(PROBES)
    probes = [_Probe(model, state, batch, point, history) for point in points]
    peaks = [-(-probe.run().peak // probe.batch) for probe in probes]
    if len(points) == 1:
        return sympy.Integer(peaks[0])
    slope = sympy.Rational(peaks[1] - peaks[0], points[1] - points[0])
    return peaks[0] + slope * (tokens - points[0])


class _Probe:
    """One step behind a made-up history.

    Args:
        model, state: to run.
        batch: sequences, of which at most so many are run that the step stays short.
        tokens: of the step.
        history: tokens before it.
    """

    def __init__(self, model: Any, state: Installed, batch: int, tokens: int, history: int) -> None:
        self.model, self.state, self.tokens = model, state, tokens
        self.batch = min(batch, max(1, PROBES[1] // tokens))
        most = state.program.new_cache().most
        self.history = history if most is None else max(0, min(history, most - tokens))
        self.states = 0

    def run(self) -> Allocated:
        """What the step allocates beside the cache."""
        cache = self._cache()
        step = self._step(cache)
        with torch.no_grad():
            found = allocated(step, self.state.program.device)
        states = recurrent_bytes(cache.states)
        self.states = states // self.batch
        cache.reset()  # it refers to itself, and would stay until the next collection
        return Allocated(found.peak - states, found.kept - states)

    def _cache(self) -> QuantizedCache:
        """A cache that has pages for the step and holds zeros."""
        cache = self.state.program.new_cache()
        with torch.inference_mode(False):
            cache.paged.start(self.batch)
            cache.paged.prepare(self.history + self.tokens)
            cache.lengths.fill_(self.history)
            places = torch.arange(self.history, dtype=torch.int32, device=cache.device)
            cache.positions[:, : self.history] = places
        cache.columns = self.history
        return cache

    def _step(self, cache: QuantizedCache) -> Callable[[], object]:
        device = self.state.program.device
        ids = torch.zeros(self.batch, self.tokens, dtype=torch.int64, device=device)
        model = self.model
        if self.state.captured.convention != "transformers":
            return lambda: model(ids, cache)
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            given["logits_to_keep"] = 1
        return lambda: model(input_ids=ids, **given)
