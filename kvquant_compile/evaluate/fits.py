"""Formats and tables of every point of the laboratory; what several points share is fitted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvquant_compile.calib.calibrate import CalibrationOptions, fit_tables
from kvquant_compile.codec.formats import Format, Tables
from kvquant_compile.codec.spec import LOSSLESS
from kvquant_compile.config import FormatOptions
from kvquant_compile.evaluate.points import Point
from kvquant_compile.evaluate.run import Prepared
from kvquant_compile.mixed.choose import best_picks, probe_losses
from kvquant_compile.mixed.measure import Losses
from kvquant_compile.mixed.request import MixedBits
from kvquant_compile.mixed.widths import Fitted, Item, candidates, fit_widths
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.progress import Progress
from kvquant_compile.recipes.choice import Choice, stored_layers
from kvquant_compile.runtime.program import Program, build_program

Named = tuple[str, FormatOptions]


def _named(choice: Choice) -> Named:
    """What widths of a recipe have in common: its name, and what is stored besides codes."""
    return choice.name, replace(choice.form, bits=LOSSLESS)


@dataclass(frozen=True, eq=False)
class Stored:
    """A point's layers, formats and tables, by cache index."""

    layers: tuple[MatchedLayer, ...]
    formats: Mapping[int, Format]
    tables: Mapping[int, Tables | None]

    def program(self, prepared: Prepared) -> Program:
        """The rewritten graph that reads and writes packed pages."""
        return build_program(prepared.captured, self.layers, self.formats, self.tables)


class Fits:
    """Fits widths of recipes as they are asked for, and keeps them.

    Args:
        prepared: the model and its calibration tokens.
        options: of the fit.
        bar: shows what is going on.
    """

    def __init__(self, prepared: Prepared, options: CalibrationOptions, bar: Progress) -> None:
        self.prepared, self.options, self.bar = prepared, options, bar
        self._fitted: dict[Named, Fitted] = {}
        self._losses: dict[Named, Losses] = {}

    def stored(self, point: Point) -> Stored:
        """What a point stores.

        Raises:
            KVQuantError: the recipe has no such width, or the data cannot be fitted.
        """
        choice, mixed = point.choice()
        indices = [layer.plan.index for layer in self.prepared.layers]
        if mixed is not None:
            return self._chosen(choice, mixed)
        formats = choice.formats(indices)
        layers = stored_layers(self.prepared.layers, formats)
        if choice.fixed or any(spec.lossless for spec in formats.values()):
            options = choice.calibration(self.options)
            observed = self.prepared.stored(layers)
            tables = fit_tables(self.prepared.captured, layers, formats, observed, options)
            return Stored(layers, formats, {i: tables.get(i) for i in formats})
        pairs = choice.form.pairs(indices)
        picks = {
            (i, part): pairs[i][n] for i in indices for n, part in enumerate(("keys", "values"))
        }
        return self._mixed(self.fitted(choice, sorted(set(picks.values()))), picks)

    def fitted(self, choice: Choice, widths: Sequence[int]) -> Fitted:
        """A recipe at these widths; those that are not there yet are fitted."""
        captured, have = self.prepared.captured, self._fitted.get(_named(choice))
        missing = [w for w in widths if have is None or w not in have.formats]
        if missing:
            formats = choice.formats([layer.plan.index for layer in self.prepared.layers])
            layers = stored_layers(self.prepared.layers, formats)
            options, observed = choice.calibration(self.options), self.prepared.stored(layers)
            more = fit_widths(captured, layers, choice, missing, observed, options, self.bar)
            have = more if have is None else have.extended(more)
            self._fitted[_named(choice)] = have
        assert have is not None
        return have.only(widths)

    def _chosen(self, choice: Choice, mixed: MixedBits) -> Stored:
        layers = stored_layers(
            self.prepared.layers,
            choice.formats([layer.plan.index for layer in self.prepared.layers]),
        )
        itemsize = self.prepared.captured.dtype.itemsize
        widths, budget = candidates(layers, choice, mixed, itemsize)
        fitted = self.fitted(choice, widths)
        known = self._losses.setdefault(_named(choice), {})
        missing = [w for w in widths if any(w not in known.get(i, {}) for i in fitted.items)]
        if missing:
            captured, windows = self.prepared.captured, self.prepared.windows
            found = probe_losses(captured, fitted.only(missing), windows, self.bar)
            for item, by_width in found.items():
                known[item] = {**known.get(item, {}), **by_width}
        return self._mixed(fitted, best_picks(fitted, known, budget))

    def _mixed(self, fitted: Fitted, picks: Mapping[Item, int]) -> Stored:
        tables: dict[int, Tables | None] = {**fitted.mixed_tables(picks)}
        return Stored(fitted.layers, fitted.mixed_formats(picks), tables)
