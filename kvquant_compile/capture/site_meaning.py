"""What a piece of graph between (query, keys, values) and an output means, found by running it.

Whatever the spelling, an attention site is a function f(q, K, V). Zero queries make its softmax
uniform, or show the bias of every distance, and which keys are visible; one-hot vectors read
single scores and show scale and soft-cap; random inputs then decide whether f is that attention.
Nothing is matched by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from kvquant_compile.capture.reference import CAUSAL, SLIDING, exact_attention, visible_keys
from kvquant_compile.capture.site import Site, SiteFunction, unknown_site
from kvquant_compile.capture.site_bias import read_slopes, window_of_biased

# Windows are looked for among this many keys.
_FAR = 16384
_CLOSE = 256
_LEAST = 16
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Meaning:
    """An attention site, understood.

    Attributes:
        kind, window: of its mask.
        scale, softcap: of its scores.
        mask_assumed: whether its branch had no usable mask.
        slopes: of the linear position bias, one per query head; empty when there is none.
    """

    kind: str
    window: int
    scale: float
    softcap: float
    mask_assumed: bool
    slopes: tuple[float, ...] = ()


def understand(gm: fx.GraphModule, site: Site) -> Meaning:
    """Find scale, soft-cap and mask of a site, and check them on random inputs.

    Raises:
        UnsupportedLayerError: the site is no softmax attention with a known mask.
    """
    try:
        function = SiteFunction(gm, site)
        slopes = read_slopes(function)
        kind, window, assumed = _mask(function, slopes)
        scale, softcap = _scores(gm, function)
        error = _compare(function, scale, softcap, slopes)
    except (RuntimeError, KeyError, ValueError) as failure:
        why = f"its attention cannot be run by itself: {failure}"
        raise unknown_site(site.layer, why) from failure
    if not error <= _TOLERANCE:
        why = "it is no softmax attention over repeated heads with one scale"
        raise unknown_site(site.layer, f"{why} (relative error {error:.1e})")
    return Meaning(kind, window, scale, softcap, assumed, slopes)


def _farthest_count(function: SiteFunction) -> tuple[int, int]:
    """How many of how many keys the last query sees; fewer are tried where tables end."""
    far = min(_FAR, function.site.room or _FAR)
    while True:
        try:
            q, k, v = function.zeros(1, far - 1)
            v[:, :, -1, 0] = 1
            weight = float(function(q, k, v)[0, 0, 0, 0])
            return (round(1 / weight) if weight > 0 else 0), far
        except (RuntimeError, IndexError):
            far //= 2
            if far < _LEAST:
                raise


def _mask(function: SiteFunction, slopes: tuple[float, ...]) -> tuple[str, int, bool]:
    """kind, window, and whether the traced branch leaves the mask to be confirmed."""
    if slopes:
        window = window_of_biased(function, slopes)
    else:
        seen, far = _farthest_count(function)
        window = 0 if seen in (0, far) else seen
    shapes = [(6, 0), (1, 6), (3, 7)]
    if 2 < window <= _CLOSE:
        shapes += [(3, window - 2), (1, window), (window + 3, 0)]
    found = {shape: function.visible(*shape) for shape in shapes}
    if all(torch.equal(f, visible_keys(*s, window, "cpu")) for s, f in found.items()):
        return (SLIDING if window else CAUSAL), window, False
    full = all(bool(f.all()) for f in found.values())
    # is_causal=True counts from the first key, which means causal at past 0 only.
    corner = all(torch.equal(f, visible_keys(s[0], 0, 0, "cpu")) if s[1] == 0 else
                 torch.equal(f, torch.ones_like(f).tril()) for s, f in found.items())  # fmt: skip
    if full or corner:
        return CAUSAL, 0, True
    raise unknown_site(function.site.layer, "its mask is neither causal nor a sliding window")


def _scores(gm: fx.GraphModule, function: SiteFunction) -> tuple[float, float]:
    """Scale and soft-cap, from single scores x -> s(x) read off the weights of two keys."""

    bias = 0.0

    def score(x: float) -> float:
        q, k, v = function.zeros(2, 0)
        q[..., 0], k[:, :, 1, 0] = x, 1
        v[:, :, 0, 0], v[:, :, 1, 1] = 1, 1
        out = function(q, k, v)[0, 0, 1].double()
        return float(torch.log(out[1] / out[0])) - bias

    bias = score(0.0)
    unit = 1.0
    while abs(score(unit)) > 8:
        unit /= 4
    while abs(score(unit)) < 0.25 and unit < 1e4:
        unit *= 2
    slope, double = score(unit) / unit, score(2 * unit) / (2 * unit)
    cap = 0.0
    if abs(double / slope - 1) > 100 * torch.finfo(function.dtype).eps:
        cap = _snap(gm, function, score(1e6 * unit))
        slope = cap * math.atanh(score(unit) / cap) / unit
    return _snap(gm, function, slope), cap


def _snap(gm: fx.GraphModule, function: SiteFunction, value: float) -> float:
    """The constant that was meant: 1/sqrt(width), or a number written in the graph."""
    written = [a for n in gm.graph.nodes for a in n.args if isinstance(a, (int, float)) and a > 0]
    written += [a for n in gm.graph.nodes for a in n.kwargs.values() if isinstance(a, float)]
    candidates = [function.width**-0.5, 1.0, *map(float, written)]
    candidates += [1 / c for c in map(float, written) if c]
    best = min(candidates, key=lambda c: abs(c - value))
    close = 1000 * torch.finfo(function.dtype).eps * abs(value)
    return best if abs(best - value) <= close else value


def _compare(
    function: SiteFunction, scale: float, softcap: float, slopes: tuple[float, ...]
) -> float:
    """Relative error against plain attention with the site's own visibility."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.tensor(slopes, device=function.device) if slopes else None
    worst = 0.0
    for tokens, past in ((6, 0), (1, 6), (3, 7)):
        q, k, v = (
            torch.randn(t.shape, generator=generator).to(t) for t in function.zeros(tokens, past)
        )
        got = function(q, k, v).double()
        mask = function.visible(tokens, past).to(function.device)[None, None]
        plain = exact_attention(q, k, v, mask, None, scale, softcap, bias)
        plain = plain.transpose(1, 2).double()
        if got.shape != plain.shape:
            return math.inf
        worst = max(worst, float((got - plain).norm() / plain.norm()))
    return worst
