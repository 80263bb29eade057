"""From ``recipe=`` and ``bits=`` to the format of every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvquant_compile.calib.calibrate import CalibrationOptions
from kvquant_compile.codec.algebra import Recipe
from kvquant_compile.codec.formats import Format
from kvquant_compile.codec.layout import lossless_spec
from kvquant_compile.codec.spec import LOSSLESS, CodecSpec
from kvquant_compile.config import Bits, FormatOptions, Slots
from kvquant_compile.errors import OptionError
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.recipes.named import NAMED

OURS, PUBLISHED = "kvquant+", "kvquant"
PUBLISHED_SLOTS = 2
"""1.6 % of a head of 128, for KVQuant's 1 % of all heads of a token together."""
Chosen = str | Recipe | Callable[..., Recipe]


@dataclass(frozen=True)
class Choice:
    """A checked recipe.

    Attributes:
        name: of it.
        form: widths, slots, sinks and exact last tokens.
        make: the recipe at two widths; None for formats that are not made of blocks.
        asked: whether the user asked for any of it.
        fixed: whether the recipe has its own widths.
    """

    name: str
    form: FormatOptions
    make: Callable[..., Recipe] | None
    asked: bool
    fixed: bool = False

    def formats(self, indices: Sequence[int]) -> dict[int, Format]:
        """The format of every cache layer.

        Raises:
            OptionError: the recipe has no such width, or ``bits`` names layers wrongly.
        """
        if self.make is not None:
            pairs = self.form.pairs(indices)
            return {index: self._blocks(pair) for index, pair in pairs.items()}
        specs = self.form.specs(indices)
        if self.name == PUBLISHED:
            return {i: _without_token_scale(spec) for i, spec in specs.items()}
        return dict(specs)

    def calibration(self, options: CalibrationOptions) -> CalibrationOptions:
        """Calibration as the recipe wants it."""
        if self.make is not None:  # nothing in a block asks for gradients
            return replace(options, fit=replace(options.fit, sensitivity=False))
        return replace(options, fit=replace(options.fit, published=self.name == PUBLISHED))

    def _blocks(self, widths: tuple[int, int]) -> Format:
        assert self.make is not None
        if widths[0] == LOSSLESS:
            return lossless_spec()
        try:
            made = self.make() if self.fixed else self.make(*widths)
        except TypeError as error:
            raise _unusable(self.name, str(error)) from error
        if not isinstance(made, Recipe):
            raise _unusable(self.name, f"it returned a {type(made).__name__}")
        return made


def choose(
    recipe: Chosen | None,
    bits: Bits | Mapping[int, Bits] | None,
    slots: Slots | None = None,
    sinks: int | None = None,
    recent_window: int | None = None,
) -> Choice:
    """Check what the user asked for; None takes the default everywhere.

    Args:
        recipe: a name, a :class:`Recipe`, or a function of the widths that returns one.
        bits: as of :func:`kvquant_compile.optimize`.
        slots: for ``kvquant+`` and ``kvquant`` only.
        sinks: exact leading tokens; the recipe's own if None.
        recent_window: exact last tokens, for ``kvquant+`` and ``kvquant`` only.

    Raises:
        OptionError: no such recipe, or an option that it does not have.
    """
    options = (recipe, bits, slots, sinks, recent_window)
    asked = any(option is not None for option in options)
    own: tuple[Slots | None, int | None] = slots, recent_window
    if recipe == PUBLISHED:  # it has no exact last tokens
        own = PUBLISHED_SLOTS if slots is None else slots, recent_window or 0
    form = FormatOptions.make(bits, own[0], sinks, own[1])
    if recipe is None or recipe in (OURS, PUBLISHED):
        return Choice(str(recipe or OURS), form, None, asked)
    make = _maker(recipe)
    if slots is not None:
        raise OptionError(
            f"slots={slots} with a recipe",
            why="outlier slots are part of kvquant+ and kvquant",
            do="Leave slots out, or put an Outliers block into the recipe.",
        )
    if recent_window is not None:
        raise OptionError(
            f"recent_window={recent_window} with a recipe",
            why="a recipe made of blocks says itself which last tokens stay exact",
            do="Leave recent_window out, or put Tail(recent=...) into the recipe.",
        )
    fixed = isinstance(recipe, Recipe)
    if fixed and bits is not None:
        raise OptionError(
            "bits with a Recipe",
            why=f"the recipe {_name(recipe)!r} has its own widths",
            do="Leave bits out, or pass the function that makes the recipe from the widths.",
        )
    if sinks is not None:
        make = _with_sinks(make, sinks)
    return Choice(_name(recipe), form, make, asked, fixed or bits is None)


def stored_layers(
    layers: Sequence[MatchedLayer], formats: Mapping[int, Format]
) -> tuple[MatchedLayer, ...]:
    """The layers as their formats store them: keys behind RoPE where a recipe wants them so."""
    return tuple(
        layer if _before_rope(formats[layer.plan.index]) else _after_rope(layer) for layer in layers
    )


def _before_rope(spec: Format) -> bool:
    return spec.pre_rope if isinstance(spec, Recipe) else True


def _after_rope(layer: MatchedLayer) -> MatchedLayer:
    plan = layer.plan
    return replace(layer, plan=replace(plan, rope=None, kept=plan.rope, refusal=""))


def _without_token_scale(spec: CodecSpec) -> CodecSpec:
    return spec if spec.lossless else replace(spec, key_token_scale=False)


def _maker(recipe: Chosen) -> Callable[..., Recipe]:
    if isinstance(recipe, str):
        if recipe not in NAMED:
            raise OptionError(
                f"recipe={recipe!r}",
                why=f"the named ones are {', '.join((OURS, PUBLISHED, *NAMED))}",
                do="Pass one of them, or a kvquant_compile.recipes.Recipe.",
            )
        return NAMED[recipe]
    if isinstance(recipe, Recipe):
        return lambda: recipe
    if not callable(recipe):
        raise OptionError(
            f"recipe={recipe!r}",
            why="it is no name, no Recipe and no function",
            do="Pass a name or a kvquant_compile.recipes.Recipe.",
        )
    return recipe


def _name(recipe: Chosen) -> str:
    if isinstance(recipe, str):
        return recipe
    return recipe.name if isinstance(recipe, Recipe) else getattr(recipe, "__name__", "a function")


def _unusable(name: str, why: str) -> OptionError:
    return OptionError(
        f"recipe {name} cannot be made",
        why=why,
        do="Pass a function of the keys' and the values' width, both with defaults, that returns "
        "a Recipe.",
    )


def _with_sinks(make: Callable[..., Recipe], sinks: int) -> Callable[..., Recipe]:
    def changed(*widths: int) -> Recipe:
        return replace(make(*widths), sinks=sinks)

    return changed
