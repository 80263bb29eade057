"""Formats, tables and bytes of every layer at every width, and mixtures of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvquant_compile.calib.calibrate import CalibrationOptions, fit_tables
from kvquant_compile.calib.observe import Observed
from kvquant_compile.capture.captured import Captured
from kvquant_compile.codec.algebra import Recipe
from kvquant_compile.codec.algebra.recipe import RecipeTables
from kvquant_compile.codec.formats import Format, Tables, page_layout
from kvquant_compile.codec.spec import PAGE_TOKENS, LayerTables
from kvquant_compile.errors import OptionError
from kvquant_compile.evaluate.stored import KEYS, PARTS, VALUES, Trip, round_trip
from kvquant_compile.mixed.request import MOST, MixedBits
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.progress import Progress
from kvquant_compile.recipes.choice import Choice

Item = tuple[int, str]
"""(cache index, "keys" or "values")."""
BELOW, ABOVE = 1, 2


@dataclass(frozen=True, eq=False)
class Fitted:
    """Every layer at every width, keys and values alike.

    Attributes:
        choice: the recipe.
        layers: as the recipe stores them.
        itemsize: bytes of an element of the model's dtype.
        formats, tables: by width, then by cache index.
    """

    choice: Choice
    layers: tuple[MatchedLayer, ...]
    itemsize: int
    formats: Mapping[int, Mapping[int, Format]]
    tables: Mapping[int, Mapping[int, Tables]]

    @property
    def widths(self) -> list[int]:
        """Ascending."""
        return sorted(self.formats)

    @property
    def items(self) -> list[Item]:
        """What a width is chosen for."""
        return [(layer.plan.index, part) for layer in self.layers for part in PARTS]

    def only(self, widths: Sequence[int]) -> Fitted:
        """The same at some of its widths."""
        return replace(
            self,
            formats={width: self.formats[width] for width in widths},
            tables={width: self.tables[width] for width in widths},
        )

    def extended(self, more: Fitted) -> Fitted:
        """The same at the widths of another as well."""
        formats, tables = {**self.formats, **more.formats}, {**self.tables, **more.tables}
        return replace(self, formats=formats, tables=tables)

    def trips(self) -> dict[tuple[Item, int], Trip]:
        """The round trip of every item at every width; no last tokens are exact."""
        return {
            ((plan.index, part), width): round_trip(
                plan, self.formats[width][plan.index], self.tables[width][plan.index], part,
                tail=False,
            )
            for plan in (layer.plan for layer in self.layers)
            for part in PARTS
            for width in self.widths
        }  # fmt: skip

    def page_bytes(self, picks: Mapping[Item, int]) -> int:
        """Bytes of a page of every layer and head, for a width of every item."""
        return _page_bytes(self.layers, self.mixed_formats(picks), self.itemsize)

    def costs(self, item: Item) -> list[int]:
        """Bytes of a page by width; of keys with values at the least width, and the reverse.

        Pages are keys then values, so that differences do not depend on the other part.
        """
        index, part = item
        layer = next(layer for layer in self.layers if layer.plan.index == index)
        least, costs = self.widths[0], []
        for width in self.widths:
            picks = {(index, KEYS): least, (index, VALUES): least, (index, part): width}
            spec = _formats(self.choice, picks, [index])
            costs.append(_page_bytes([layer], spec, self.itemsize))
        return costs

    def mixed_formats(self, picks: Mapping[Item, int]) -> dict[int, Format]:
        """The format of every layer for a width of every item."""
        return _formats(self.choice, picks, [layer.plan.index for layer in self.layers])

    def mixed_tables(self, picks: Mapping[Item, int]) -> dict[int, Tables]:
        """Constants for :meth:`mixed_formats`, of those that were fitted.

        Raises:
            OptionError: the recipe's keys at a width depend on the values' width, or the reverse.
        """
        out: dict[int, Tables] = {}
        for index, spec in self.mixed_formats(picks).items():
            widths = picks[index, KEYS], picks[index, VALUES]
            keys, values = (self.tables[width][index] for width in widths)
            if isinstance(spec, Recipe):
                made = [self.formats[width][index] for width in widths]
                out[index] = _mixed_blocks(spec, made, [keys, values])
            else:
                out[index] = _mixed_ours(keys, values)
        return out


def fit_widths(
    captured: Captured,
    layers: Sequence[MatchedLayer],
    choice: Choice,
    widths: Sequence[int],
    observed: Mapping[int, Observed],
    options: CalibrationOptions,
    bar: Progress,
) -> Fitted:
    """Fit every layer's tables at every width; arguments as of ``calibrate``."""
    indices = [layer.plan.index for layer in layers]
    formats = {
        width: replace(choice, form=replace(choice.form, bits=width)).formats(indices)
        for width in widths
    }
    tables = {
        width: fit_tables(captured, layers, formats[width], observed, options)
        for width in bar.each("fit tables", widths, len(widths))
    }
    return Fitted(choice, tuple(layers), captured.dtype.itemsize, formats, tables)


def candidates(
    layers: Sequence[MatchedLayer], choice: Choice, request: MixedBits, itemsize: int
) -> tuple[list[int], int]:
    """Widths worth trying around a budget, and the budget in bytes of a page.

    Raises:
        OptionError: the budget is below what one bit takes.
    """
    by_width = {}
    for width in range(1, MOST + 1):
        formats = replace(choice, form=replace(choice.form, bits=width)).formats(
            [layer.plan.index for layer in layers]
        )
        by_width[width] = _page_bytes(layers, formats, itemsize)
    budget = _budget(layers, request, by_width)
    fitting = [width for width, size in by_width.items() if size <= budget]
    if not fitting:
        raise OptionError(
            f"a budget of {request.asked}",
            why=f"one bit takes {by_width[1] / PAGE_TOKENS:g} bytes a token, "
            f"{8 * by_width[1] / _elements(layers):.3f} effective bits",
            do="Allow more, or pass slots=0.",
        )
    below, above = max(1, fitting[-1] - BELOW), min(MOST, fitting[-1] + 1 + ABOVE)
    return list(range(below, above + 1)), budget


def _budget(layers: Sequence[MatchedLayer], request: MixedBits, by_width: Mapping[int, int]) -> int:
    if request.mean is not None:
        low, part = math.floor(request.mean), request.mean % 1
        return math.floor((1 - part) * by_width[low] + part * by_width[low + 1] + 1e-6)
    if request.effective_bits is not None:
        return math.floor(request.effective_bits * _elements(layers) / 8)
    assert request.token_bytes is not None
    return math.floor(request.token_bytes * PAGE_TOKENS)


def _elements(layers: Sequence[MatchedLayer]) -> int:
    """Elements of a page, all layers and heads."""
    plans = [layer.plan for layer in layers]
    return PAGE_TOKENS * sum(p.kv_heads * (p.key_dim + p.value_dim) for p in plans)


def _formats(
    choice: Choice, picks: Mapping[Item, int], indices: Sequence[int]
) -> dict[int, Format]:
    bits = {i: (picks[i, KEYS], picks[i, VALUES]) for i in indices}
    return replace(choice, form=replace(choice.form, bits=bits)).formats(indices)


def _page_bytes(
    layers: Sequence[MatchedLayer], formats: Mapping[int, Format], itemsize: int
) -> int:
    total = 0
    for layer in layers:
        plan = layer.plan
        sizes = (plan.kv_heads, plan.key_dim, plan.value_dim, itemsize)
        layout = page_layout(formats[plan.index], *sizes)
        total += plan.kv_heads * layout.page_bytes
    return total


def _mixed_ours(keys: Tables, values: Tables) -> LayerTables:
    parts = {name: t for name, t in keys.tensors().items() if name.startswith("key_")}
    parts |= {name: t for name, t in values.tensors().items() if name.startswith("value_")}
    return LayerTables(**parts)


def _mixed_blocks(spec: Recipe, made: Sequence[Format], fitted: Sequence[Tables]) -> RecipeTables:
    keys, values = made
    assert isinstance(keys, Recipe)
    assert isinstance(values, Recipe)
    if (spec.keys, spec.values) != (keys.keys, values.values):
        raise OptionError(
            f"recipe {spec.name} with widths of its layers' own",
            why="its keys depend on the width of its values, or the reverse",
            do="Write its function so that they do not.",
        )
    first, second = fitted
    assert isinstance(first, RecipeTables)
    assert isinstance(second, RecipeTables)
    constants = keys.constants(first.constants)[0] + values.constants(second.constants)[1]
    return RecipeTables(spec.names, constants)
