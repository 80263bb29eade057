"""What the fit does, ingredient by ingredient; every one can be switched off for an ablation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FitSettings:
    """Switches and strengths of the table fit.

    Attributes:
        key_nuq, value_nuq: k-means tables up to 4 bits; evenly spaced ones otherwise.
        sensitivity: weigh errors by squared gradients (Fisher); off: all errors alike.
        scale_squared: weigh normalised errors by the squared scale as well (equation 7).
        token_power: power of a token's gradient norm in its weight; tokens which attention
            singles out are few, unusual and carry most of the gradient.
        refine: alternating steps of codes, channel scales and table; 0 keeps scales of two
            and a half standard deviations.
        stretch: undo the shrinkage of keys, so that k^ regressed on k has slope 1 (Q-Norm).
        value_transform: divide values by static per-channel deviations after centring.
        value_feedback: move the coding errors of values as gradients prescribe.
        damping: part of the mean diagonal added to the gradients' second moment.
        fit_tokens: most tokens used by the alternating steps.
    """

    key_nuq: bool = True
    value_nuq: bool = False
    sensitivity: bool = True
    scale_squared: bool = True
    token_power: float = 1.0
    refine: int = 6
    stretch: bool = True
    value_transform: bool = False
    value_feedback: bool = True
    damping: float = 0.1
    fit_tokens: int = 8192
