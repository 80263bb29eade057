"""What ``optimize`` refuses, or warns about, before it changes anything."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kvquant_compile.calib.artifact import Artifact
from kvquant_compile.errors import OptionError, UnsupportedLayerError
from kvquant_compile.mixed.request import MixedBits
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.recipes.choice import Choice
from kvquant_compile.runtime.installed import ATTRIBUTE


def refuse_optimised(model: nn.Module) -> None:
    """A model that is optimised already, or something that is no model.

    Raises:
        OptionError: it is.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"cannot optimise a {type(model).__name__}",
            why="it is no torch.nn.Module",
            do="Pass the loaded model itself.",
        )
    if any(ATTRIBUTE in module.__dict__ for module in model.modules()):
        raise OptionError(
            f"{type(model).__name__} is already optimised",
            why="its forward already runs a rewritten graph",
            do="Call kvquant_compile.restore(model) first to optimise it anew.",
        )


def given_artifact(calibration: Any) -> Artifact | None:
    """The artifact that ``calibration`` is or names; None where it is data.

    Raises:
        ArtifactError: the file cannot be used.
    """
    if isinstance(calibration, Artifact):
        return calibration
    is_file = isinstance(calibration, str) and calibration.endswith(".safetensors")
    if isinstance(calibration, Path) or is_file:
        return Artifact.load(calibration)
    return None


def check_asked(choice: Choice, mixed: MixedBits | None, artifact: Artifact) -> None:
    """An artifact has its format; asking for another beside it must not be ignored.

    Raises:
        OptionError: another was asked for.
    """
    if mixed is not None or choice.formats(list(artifact.specs)) != artifact.specs:
        raise OptionError(
            "the artifact has another format than was asked for",
            why="its tables were fitted for its own recipe, bits, slots and sinks",
            do="Leave recipe, bits, slots and sinks out to use the artifact's, or calibrate anew.",
        )


def check_refusals(layers: Sequence[MatchedLayer], strict: bool) -> None:
    """Keys that must be stored after RoPE: an error, or one warning.

    Raises:
        UnsupportedLayerError: there are some and ``strict`` is set.
    """
    refused = [layer.plan for layer in layers if layer.plan.refusal]
    if not refused:
        return
    reasons = "; ".join(sorted({plan.refusal for plan in refused}))
    names = ", ".join(str(plan.index) for plan in refused)
    error = UnsupportedLayerError(
        "keys cannot be stored before RoPE",
        where=f"layers {names}",
        why=reasons,
        do="Pass strict=False to quantise these layers' keys after RoPE.",
    )
    if strict:
        raise error
    warnings.warn(f"kvquant_compile: {error}", stacklevel=3)
