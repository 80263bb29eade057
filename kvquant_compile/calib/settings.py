"""What the fit does, ingredient by ingredient; every one can be switched off for an ablation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FitSettings:
    """Switches and strengths of the table fit.

    Attributes:
        key_nuq, value_nuq: k-means tables up to 4 bits; evenly spaced ones otherwise.
        sensitivity: weigh errors by squared gradients (Fisher); off: all errors alike.
        channel_power, token_power: how strongly the Fisher information of a channel, and the
            gradient norm of a token, weigh in the key fit. Tokens that attention singles out
            are few, unusual, and carry most of the gradient.
        scale_squared: weigh normalised errors by the squared scale as well (equation 7).
        refine: alternating steps of codes, channel scales and table; with 0, scales stay the
            channels' deviations.
        stretch: part of the shrinkage of keys that is undone (Q-Norm): with 1, stored keys
            regressed on true ones have slope 1. More lowers perplexity, less the divergence.
        value_transform: divide values by static per-channel deviations after centring; None: in
            heads where that lowers the expected loss. A channel that is always large would take
            the range of all tokens otherwise.
        value_range: part of a token's inlier range that the value table spans; None: searched
            for (``value_clip``), or by width.
        value_clip: search that part head by head for the least expected loss; needs gradients.
        key_feedback, value_feedback: move coding errors as the gradients prescribe.
        damping: part of the mean diagonal added to the gradients' second moment before it is
            inverted for the feedback.
        fit_tokens: most tokens used by the alternating steps.
        published: fit as KVQuant was published instead (:mod:`.fit_published`); of the others only
            ``sensitivity`` counts then.
    """

    key_nuq: bool = True
    value_nuq: bool = False
    sensitivity: bool = True
    channel_power: float = 0.5
    token_power: float = 1.0
    scale_squared: bool = True
    refine: int = 6
    stretch: float = 0.5
    value_transform: bool | None = None
    value_range: float | None = None
    value_clip: bool = True
    key_feedback: bool = True
    value_feedback: bool = True
    damping: float = 0.03
    fit_tokens: int = 8192
    published: bool = False
