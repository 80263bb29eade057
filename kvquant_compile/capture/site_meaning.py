"""What a piece of graph between (query, keys, values) and an output means, found by running it.

Whatever the spelling, an attention site is a function f(q, K, V). Zero queries make its softmax
uniform and show which keys are visible; one-hot vectors read single scores and show scale and
soft-cap; random inputs then decide whether f is that attention. Nothing is matched by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvquant_compile.capture.reference import CAUSAL, SLIDING, exact_attention, visible_keys
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.errors import UnsupportedLayerError

# Windows are looked for among this many keys.
_FAR = 16384
_CLOSE = 256
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Meaning:
    """An attention site, understood; ``mask_assumed`` if its branch had no usable mask."""

    kind: str
    window: int
    scale: float
    softcap: float
    mask_assumed: bool


@dataclass(frozen=True)
class Site:
    """A cut of the graph: from query, keys [B, Hkv, T, D] and values to the output."""

    layer: int
    out: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node

    @property
    def query_layout(self) -> str:
        """``bhsd`` or ``bshd``."""
        return _layout(self.query, self.layer)

    @property
    def out_layout(self) -> str:
        """``bhsd`` or ``bshd``."""
        return _layout(self.out, self.layer)


def _layout(node: fx.Node, layer: int) -> str:
    shape = list(node.meta["val"].shape)
    if len(shape) == 4 and isinstance(shape[3], int):
        if isinstance(shape[1], int) and not isinstance(shape[2], int):
            return "bhsd"
        if isinstance(shape[2], int) and not isinstance(shape[1], int):
            return "bshd"
    raise _unknown(layer, f"{node.name} has shape {shape}, which is no layout of heads")


def _unknown(layer: int, why: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        "an attention layer cannot be captured",
        where=f"layer {layer}",
        why=why,
        do="Only causal and sliding-window softmax attention is supported.",
    )


class _Function:
    """The site as a function of tensors in head layout, on the model's device."""

    def __init__(self, gm: fx.GraphModule, site: Site) -> None:
        self.gm, self.site = gm, site
        self.ids, self.past = gm.graph.find_nodes(op="placeholder")
        query, key, value = (n.meta["val"] for n in (site.query, site.key, site.value))
        self.query_heads = query.shape[1 if site.query_layout == "bhsd" else 2]
        self.kv_heads, self.width, self.out_width = key.shape[1], key.shape[3], value.shape[3]
        self.dtype, self.device = key.dtype, key.device

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, Hq, S, Dv]; the past length is what the keys have more than the queries."""
        tokens = q.shape[2]
        query = q if self.site.query_layout == "bhsd" else q.transpose(1, 2)
        values = {
            self.ids: torch.zeros(q.shape[0], tokens, dtype=torch.long, device=self.device),
            self.past: k.shape[2] - tokens,
            self.site.query: query,
            self.site.key: k,
            self.site.value: v,
        }
        with torch.no_grad():
            out = Evaluator(self.gm, values)(self.site.out)
        return out if self.site.out_layout == "bhsd" else out.transpose(1, 2)

    def zeros(self, tokens: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, K and V of zeros, batch 1."""
        sizes = ((self.query_heads, tokens, self.width), (self.kv_heads, tokens + past, self.width),
                 (self.kv_heads, tokens + past, self.out_width))  # fmt: skip
        q, k, v = (torch.zeros(1, *s, dtype=self.dtype, device=self.device) for s in sizes)
        return q, k, v

    def visible(self, tokens: int, past: int) -> Tensor:
        """Which keys have a weight: bool [tokens, past + tokens], on the CPU."""
        q, k, v = self.zeros(tokens, past)
        seen = []
        for start in range(0, past + tokens, self.out_width):
            v.zero_()
            count = min(self.out_width, past + tokens - start)
            places = torch.arange(count)
            v[:, :, start + places, places] = 1
            seen.append(self(q, k, v)[0, 0, :, :count] > 0)
        return torch.cat(seen, 1).cpu()


def understand(gm: fx.GraphModule, site: Site) -> Meaning:
    """Find scale, soft-cap and mask of a site, and check them on random inputs.

    Raises:
        UnsupportedLayerError: the site is no softmax attention with a known mask.
    """
    try:
        function = _Function(gm, site)
        kind, window, assumed = _mask(function)
        scale, softcap = _scores(gm, function)
        error = _compare(function, scale, softcap, window)
    except (RuntimeError, KeyError, ValueError) as failure:
        raise _unknown(site.layer, f"its attention cannot be run by itself: {failure}") from failure
    if not error <= _TOLERANCE[function.dtype]:
        raise _unknown(site.layer, "it is no softmax attention over repeated heads with one scale"
                       f" (relative error {error:.1e})")  # fmt: skip
    return Meaning(kind, window, scale, softcap, assumed)


def _mask(function: _Function) -> tuple[str, int, bool]:
    """kind, window, and whether the traced branch leaves the mask to be confirmed."""
    q, k, v = function.zeros(1, _FAR - 1)
    v[:, :, -1, 0] = 1
    weight = float(function(q, k, v)[0, 0, 0, 0])
    seen = round(1 / weight) if weight > 0 else 0
    # Weights of half-precision models are coarse: a count within their rounding is "all".
    window = 0 if seen == 0 or seen > 0.98 * _FAR else seen
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
    raise _unknown(function.site.layer, "its mask is neither causal nor a sliding window")


def _scores(gm: fx.GraphModule, function: _Function) -> tuple[float, float]:
    """Scale and soft-cap, from single scores x -> s(x) read off the weights of two keys."""

    def score(x: float) -> float:
        q, k, v = function.zeros(2, 0)
        q[..., 0], k[:, :, 1, 0] = x, 1
        v[:, :, 0, 0], v[:, :, 1, 1] = 1, 1
        out = function(q, k, v)[0, 0, 1].double()
        return float(torch.log(out[1] / out[0]))

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


def _snap(gm: fx.GraphModule, function: _Function, value: float) -> float:
    """The constant that was meant: 1/sqrt(width), or a number written in the graph."""
    written = [a for n in gm.graph.nodes for a in n.args if isinstance(a, (int, float)) and a > 0]
    written += [a for n in gm.graph.nodes for a in n.kwargs.values() if isinstance(a, float)]
    candidates = [function.width**-0.5, 1.0, *map(float, written)]
    candidates += [1 / c for c in map(float, written) if c]
    best = min(candidates, key=lambda c: abs(c - value))
    close = 1000 * torch.finfo(function.dtype).eps if function.dtype.itemsize > 2 else 0.02
    return best if abs(best - value) <= close * abs(value) else value


def _compare(function: _Function, scale: float, softcap: float, window: int) -> float:
    """Relative error against plain attention with the site's own visibility."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for tokens, past in ((6, 0), (1, 6), (3, 7)):
        q, k, v = (
            torch.randn(t.shape, generator=generator).to(t) for t in function.zeros(tokens, past)
        )
        got = function(q, k, v).double()
        mask = function.visible(tokens, past).to(function.device)[None, None]
        plain = exact_attention(q, k, v, mask, None, scale, softcap).transpose(1, 2).double()
        if got.shape != plain.shape:
            return math.inf
        worst = max(worst, float((got - plain).norm() / plain.norm()))
    return worst
