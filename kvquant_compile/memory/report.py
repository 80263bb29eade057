"""``memory_report`` and ``max_context``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import sympy
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import nn

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.errors import OptionError
from kvquant_compile.memory.allocated import held, weight_bytes
from kvquant_compile.memory.formulas import (
    BATCH,
    CONTEXT,
    LayerMemory,
    cache_formula,
    layer_cache,
    text,
)
from kvquant_compile.memory.units import parse_bytes, readable
from kvquant_compile.memory.workspace import Workspace, measure
from kvquant_compile.passes.rewrite import CONSTANT_PREFIX
from kvquant_compile.runtime.installed import Installed, installed

_BLOCK = re.compile(r"\.(\d+)\.")
MOST_CONTEXT = 2**40


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of an optimised model; ``print`` it, or take :meth:`to_dict`.

    Attributes:
        model: class name.
        device: where it lies.
        context, batch: what the numbers are for.
        layers: one entry per cache layer.
        formulas: part -> sympy expression in T (context) and B (batch), bytes.
        original_cache: the same for a full-precision cache.
        measured: whether workspace was measured; it is 0 where not.
        itemsize: bytes of an element of the model's dtype.
        states: bytes of a sequence's recurrent states, which the cache holds too.
    """

    model: str
    device: str
    context: int
    batch: int
    layers: tuple[LayerMemory, ...]
    formulas: dict[str, sympy.Expr]
    original_cache: sympy.Expr
    measured: bool
    itemsize: int
    states: int

    @property
    def total(self) -> sympy.Expr:
        """Bytes of all parts, in T and B."""
        return sum(self.formulas.values(), sympy.Integer(0))

    def bytes(self, part: str | None = None, context: int = 0, batch: int = 0) -> int:
        """Bytes of a part, or of all.

        Args:
            part: a key of ``formulas``; None for the total.
            context, batch: 0 for the report's own.
        """
        formula = self.total if part is None else self.formulas[part]
        return self._at(formula, context or self.context, batch or self.batch)

    def longest(self, memory: int) -> int:
        """The longest context whose total by these formulas is within ``memory`` bytes."""
        return largest(lambda tokens: self.bytes(context=tokens) <= memory)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: formulas as text, and their values."""
        layers = [
            {
                **asdict(layer),
                "cache": {"formula": str(layer.cache), "bytes": self._at(layer.cache)},
            }
            for layer in self.layers
        ]
        parts = {
            name: {"formula": str(formula), "bytes": self._at(formula)}
            for name, formula in {**self.formulas, "total": self.total}.items()
        }
        head = {"model": self.model, "device": self.device}
        size = {"context": self.context, "batch": self.batch, "measured": self.measured}
        original = {"formula": str(self.original_cache), "bytes": self._at(self.original_cache)}
        return {**head, **size, "layers": layers, "parts": parts, "original_cache": original}

    def __rich__(self) -> Group:
        head = (
            f"{self.model} ({self.device}), {self.context:,} tokens x {self.batch}: "
            f"{readable(self.bytes())}"
        )
        layers = Table(show_edge=False, pad_edge=False)
        for name in ("layer", "pages", "cache", "B/token", "original", "tables", "weights"):
            layers.add_column(name, justify="right")
        for layer in self.layers:
            layers.add_row(
                str(layer.index), layer.kind, readable(self._at(layer.cache)),
                f"{layer.page_bytes / PAGE_TOKENS:.1f}", f"{layer.original_bytes:.1f}",
                readable(layer.tables), readable(layer.weights),
            )  # fmt: skip
        parts = Table(show_edge=False, pad_edge=False)
        parts.add_column("part")
        parts.add_column("bytes", justify="right")
        parts.add_column("formula (T tokens, B sequences)")
        rows = {**self.formulas, "total": self.total, "cache of the original": self.original_cache}
        for name, formula in rows.items():
            shown = "the sum" if name == "total" else str(formula)
            if name == "workspace" and not self.measured:
                shown = "not measured"
            parts.add_row(name, readable(self._at(formula)), shown)
        return Group(Text(head, style="bold"), layers, Text(""), parts)

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _at(self, formula: sympy.Expr, context: int = 0, batch: int = 0) -> int:
        values = {CONTEXT: context or self.context, BATCH: batch or self.batch}
        return int(sympy.ceiling(formula.subs(values)))


def memory_report(
    model: nn.Module,
    context: int,
    batch: int = 1,
    *,
    prompt: int | None = None,
    workspace: bool = True,
) -> MemoryReport:
    """What an optimised model takes for sequences of ``context`` tokens: formulas and numbers.

    Weights, tables and cache follow from the program and are exact. Workspace is measured: a few
    steps of up to 6144 tokens run on the model, and longer ones lie on their line.

    Args:
        model: an optimised model.
        context: tokens of every sequence, prompt and answer.
        batch: sequences.
        prompt: tokens before the first generated one; None: all of them. The model cuts long
            ones (``prefill_chunk``), which bounds the workspace.
        workspace: False leaves the workspace out, and runs nothing.

    Raises:
        OptionError: the model is not optimised, or a number is not positive.
    """
    _check(context=context, batch=batch, prompt=prompt)
    state = installed(model)
    found = measure(model, context, batch, prompt) if workspace else Workspace(sympy.Integer(0))
    layers = _layers(state)
    sizes = [(layer.page_bytes, layer.exact_bytes) for layer in layers]
    tables = sum(layer.tables for layer in layers) + found.kept
    return MemoryReport(
        model=type(model).__name__,
        device=str(state.program.device),
        context=context,
        batch=batch,
        layers=layers,
        formulas={
            "weights": sympy.Integer(weight_bytes(model)),
            "tables": sympy.Integer(tables),
            "cache": cache_formula(sizes, found.states),
            "workspace": found.formula,
            "tokens and masks": text(),
        },
        original_cache=BATCH * CONTEXT * sum(layer.original_bytes for layer in layers),
        measured=workspace,
        itemsize=state.program.dtype.itemsize,
        states=found.states,
    )


def max_context(
    model: nn.Module, memory: int | float | str, batch: int = 1, *, prompt: int | None = None
) -> int:
    """The longest context that fits, in tokens of every sequence; 0 where none does.

    Exact where the context is much longer than a chunk of a prompt; below, where the workspace
    depends on it as well, it may be a sixty-fourth too short.

    Args:
        model: an optimised model.
        memory: bytes for everything, the weights included: a number, "24 GB", "24 GiB".
        batch: sequences.
        prompt: as of :func:`memory_report`.

    Raises:
        OptionError: as :func:`memory_report`, or ``memory`` is no number of bytes.
    """
    limit = parse_bytes(memory)
    state = installed(model)
    most = state.program.new_cache().most or MOST_CONTEXT
    known = min(most, 2 * (state.prefill_chunk or 4096))
    fits, fails = 0, MOST_CONTEXT
    while fails - fits > 1 + fits // 64:
        report = memory_report(model, known, batch, prompt=prompt)
        found = min(most, report.longest(limit))
        if found >= known:
            fits = known
        else:
            fails = known
        if found == known:
            return found
        # A report's formula is right near its own context; elsewhere the interval is halved.
        known = found if fits < found < fails else (fits + fails) // 2
    return fits


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where with a number all smaller ones do; 0 where none does."""
    low, high = 0, 1
    while high < MOST_CONTEXT and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _layers(state: Installed) -> tuple[LayerMemory, ...]:
    constants = dict(state.program.graph_module.named_buffers())
    out = []
    for matched, layout in zip(state.layers, state.program.layouts, strict=True):
        plan = matched.plan
        prefix = f"{CONSTANT_PREFIX}{plan.index}_"
        page, exact = layer_cache(layout)
        channels = plan.key_dim + plan.value_dim - plan.latent
        out.append(
            LayerMemory(
                index=plan.index,
                kind=layout.kind,
                page_bytes=page,
                exact_bytes=exact,
                original_bytes=plan.kv_heads * channels * layout.itemsize,
                tables=held(t for name, t in constants.items() if name.startswith(prefix)),
                weights=_block_bytes(state.captured.backbone, plan.index),
            )
        )
    return tuple(out)


def _block_bytes(backbone: nn.Module, index: int) -> int:
    """Bytes of the parameters whose name has the block's number first among its numbers."""
    named = backbone.named_parameters()
    numbers = ((_BLOCK.search(name), parameter) for name, parameter in named)
    return held(p for found, p in numbers if found is not None and int(found[1]) == index)


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise OptionError(
                f"{name}={value!r}",
                why="it is a number of tokens or sequences",
                do="Pass a positive whole number.",
            )


__all__ = ["MemoryReport", "largest", "max_context", "memory_report"]
