"""``optimize(model, context=..., memory=...)``: the widest format that fits, or why none does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from kvquant_compile.checks import given_artifact
from kvquant_compile.codec.formats import page_layout
from kvquant_compile.codec.spec import LOSSLESS, PAGE_TOKENS
from kvquant_compile.errors import OptionError
from kvquant_compile.memory.formulas import BATCH, CONTEXT, cache_formula, layer_cache
from kvquant_compile.memory.report import MOST_CONTEXT, MemoryReport, largest, memory_report
from kvquant_compile.memory.units import parse_bytes, readable
from kvquant_compile.mixed.request import AUTO
from kvquant_compile.plan import LayerPlan
from kvquant_compile.recipes.choice import choose
from kvquant_compile.runtime.installed import installed
from kvquant_compile.runtime.plugback import uninstall

Model = TypeVar("Model", bound=nn.Module)
WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1)
_FORMAT = (
    "bits",
    "budget",
    "recipe",
    "slots",
    "sinks",
    "recent_window",
    "calibration",
    "tokenizer",
    "dump",
)


@dataclass(frozen=True)
class Request:
    """What has to fit.

    Attributes:
        context: tokens of every sequence.
        memory: bytes of everything.
        batch: sequences.
    """

    context: int
    memory: int
    batch: int

    @staticmethod
    def make(context: Any, memory: Any, batch: Any) -> Request:
        """A checked request.

        Raises:
            OptionError: one of context and memory is missing, or something is no number.
        """
        for name, value in (("context", context), ("batch", batch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(
                    f"{name}={value!r} with memory={memory!r}",
                    why="what fits into a memory depends on context and batch, positive numbers",
                    do='Pass context=32768, memory="24 GB", and batch where it is not 1.',
                )
        return Request(context, parse_bytes(memory), batch)


def optimize_within(
    optimise: Callable[..., Model], model: Model, request: Request, options: Mapping[str, Any]
) -> Model:
    """Optimise with the widest format whose memory, measured on the result, fits.

    Args:
        optimise: :func:`kvquant_compile.optimize`.
        model: to be optimised.
        request: what has to fit.
        options: of ``optimise``; widths that are given are only checked.

    Raises:
        OptionError: nothing fits; the model is as it was.
    """
    fit = _Fit.of(optimise, model, request, options)
    for changed in fit.candidates():
        optimise(model, **{**options, **changed})
        report = memory_report(model, request.context, request.batch)
        if report.bytes() <= request.memory:
            return model
        fit.beside = max(fit.beside, report.bytes() - report.bytes("cache"))
        uninstall(model)
    raise fit.impossible()


@dataclass(eq=False)
class _Fit:
    """What is known of a model that has to fit.

    Attributes:
        request, options: as of :func:`optimize_within`.
        plans: of the cache layers.
        exact: the report of the model with exact pages, which need no calibration.
        beside: bytes of all but the cache, as measured so far.
    """

    request: Request
    options: Mapping[str, Any]
    plans: tuple[LayerPlan, ...]
    exact: MemoryReport
    beside: int

    @staticmethod
    def of(
        optimise: Callable[..., Model],
        model: Model,
        request: Request,
        options: Mapping[str, Any],
    ) -> _Fit:
        """Capture and measure the model; it is as it was afterwards."""
        plain = {name: value for name, value in options.items() if name not in _FORMAT}
        optimise(model, bits=LOSSLESS, **plain)
        try:
            exact = memory_report(model, request.context, request.batch)
            plans = tuple(layer.plan for layer in installed(model).layers)
        finally:
            uninstall(model)
        return _Fit(request, options, plans, exact, exact.bytes() - exact.bytes("cache"))

    @property
    def room(self) -> int:
        """Bytes left for the cache."""
        return self.request.memory - self.beside

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Changed options to try, the widest first; each after :attr:`beside` has been updated."""
        bits = self.options["bits"]
        if bits == AUTO and self.options["budget"] is None:
            for _ in range(2):  # once more with what the first try has taken beside its cache
                budget = self._token_budget()
                if budget >= sum(page for page, _ in self._sizes(WIDTHS[-1])) / PAGE_TOKENS:
                    yield {"budget": f"{budget:.4f} B"}
        elif bits is not None or given_artifact(self.options["calibration"]) is not None:
            yield {}
        else:
            for width in WIDTHS:
                if self._cache(width, self.request.context) <= self.room:
                    yield {"bits": width}

    def impossible(self) -> OptionError:
        """Why nothing fits, and what would."""
        request, least = self.request, WIDTHS[-1]
        needed = self.beside + self._cache(least, request.context)
        tokens = largest(lambda n: self._cache(least, n) <= self.room)
        rows = largest(lambda n: n <= request.batch and self._cache(least, request.context, n) <= (
            request.memory - self._beside(n)
        ))  # fmt: skip
        fits = [f"{tokens:,} tokens fit"] if tokens else []
        fits += [f"a batch of {rows} fits"] if rows else []
        found = " and ".join(fits) or "nothing fits beside the weights"
        return OptionError(
            f"{request.context:,} tokens x {request.batch} do not fit into "
            f"{readable(request.memory)}",
            why=f"{readable(self.beside)} are taken by weights, tables and workspace, and at "
            f"{least} bit the whole needs {readable(needed)}",
            do=f"At {least} bit {found}; or allow more memory.",
        )

    def _beside(self, batch: int) -> int:
        total = self.exact.bytes(batch=batch)
        return total - self.exact.bytes("cache", batch=batch)

    def _cache(self, width: int, context: int, batch: int = 0) -> int:
        """Bytes of the cache at a width of all layers; beyond all memory where the recipe has
        no such width."""
        try:
            sizes = self._sizes(width)
        except OptionError:
            return MOST_CONTEXT
        values = {CONTEXT: context, BATCH: batch or self.request.batch}
        return int(cache_formula(sizes, self.exact.states).subs(values))

    def _sizes(self, width: int) -> list[tuple[int, int]]:
        """(page bytes, exact bytes) of every layer."""
        given = self.options
        choice = choose(
            given["recipe"], width, given["slots"], given["sinks"], given["recent_window"]
        )
        formats = choice.formats([plan.index for plan in self.plans])
        itemsize = self.exact.itemsize
        return [
            layer_cache(page_layout(formats[p.index], p.kv_heads, p.key_dim, p.value_dim, itemsize))
            for p in self.plans
        ]

    def _token_budget(self) -> float:
        """Bytes a token of one sequence, all layers, that the room allows."""
        pages = -(-self.request.context // PAGE_TOKENS)
        sizes = self._sizes(WIDTHS[-1])
        fixed = self._cache(WIDTHS[-1], self.request.context)
        fixed -= self.request.batch * pages * sum(page for page, _ in sizes)
        page = (self.room - fixed) / (self.request.batch * pages)
        return min(page, sum(size for size, _ in self._sizes(WIDTHS[0]))) / PAGE_TOKENS
