"""The format that ``optimize`` was asked for: a recipe, widths to be chosen, or an artifact's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.calib.calibrate import CalibrationOptions, calibrate
from kvquant_compile.capture.captured import Captured
from kvquant_compile.checks import check_asked, given_artifact
from kvquant_compile.codec.algebra import Recipe
from kvquant_compile.codec.formats import Format
from kvquant_compile.config import Bits, Slots
from kvquant_compile.mixed.choose import calibrate_mixed
from kvquant_compile.mixed.request import MixedBits
from kvquant_compile.observer import Observer
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.progress import Progress
from kvquant_compile.recipes.choice import Choice, choose, stored_layers


@dataclass(frozen=True)
class Asked:
    """What was asked for, checked as far as it can be without the model.

    Attributes:
        choice: the recipe and its options.
        mixed: widths that sensitivity has to choose; None where ``choice`` has them.
        artifact: formats and tables that are there already; None where they are to be made.
        data, tokenizer: text to calibrate on, as of :func:`kvquant_compile.optimize`.
    """

    choice: Choice
    mixed: MixedBits | None
    artifact: Artifact | None
    data: Any
    tokenizer: Any

    @staticmethod
    def make(
        bits: Bits | Mapping[int, Bits] | float | str | None,
        budget: float | str | None,
        allocation: str,
        recipe: str | Recipe | Callable[..., Recipe] | None,
        exact: tuple[Slots | None, int | None, int | None],
        data: Any,
        tokenizer: Any,
    ) -> Asked:
        """From the arguments of :func:`kvquant_compile.optimize`.

        Args:
            exact: outlier slots, leading tokens and last tokens.

        Raises:
            OptionError: options are out of range, or do not belong together.
            ArtifactError: ``data`` names a file that cannot be used.
        """
        artifact = given_artifact(data)
        mixed = MixedBits.make(bits, budget, allocation)
        whole = cast(
            "Bits | Mapping[int, Bits] | None", bits if mixed is None else mixed.placeholder
        )
        choice = choose(recipe, whole, *exact)
        if artifact is not None and choice.asked:
            check_asked(choice, mixed, artifact)
        return Asked(choice, mixed, artifact, data, tokenizer)

    def stored(self, layers: Sequence[MatchedLayer]) -> tuple[MatchedLayer, ...]:
        """The layers with keys before or behind RoPE, as their formats store them.

        Raises:
            OptionError: a recipe has no such width, or ``bits`` names layers wrongly.
        """
        return stored_layers(layers, self._formats(layers))

    def fitted(
        self,
        captured: Captured,
        layers: Sequence[MatchedLayer],
        options: CalibrationOptions,
        bar: Progress,
        observer: Observer,
    ) -> Artifact:
        """Every layer's format and tables: the given ones, or fitted as ``options`` say.

        Raises:
            KVQuantError: the data is unusable, or a budget too small.
        """
        if self.artifact is not None:
            return self.artifact
        options = self.choice.calibration(options)
        data = self.data, self.tokenizer
        if self.mixed is None:
            formats = self._formats(layers)
            made = calibrate(captured, layers, formats, *data, options, bar, observer)
        else:
            made = calibrate_mixed(
                captured, layers, self.choice, self.mixed, *data, options, bar, observer
            )
        return replace(made, details={"recipe": self.choice.name, **made.details})

    def _formats(self, layers: Sequence[MatchedLayer]) -> Mapping[int, Format]:
        if self.artifact is not None:
            return self.artifact.specs
        return self.choice.formats([layer.plan.index for layer in layers])
