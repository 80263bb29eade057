"""A piece of graph between (query, keys, values) and an output, and how to run it by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvquant_compile.capture.run import Evaluator, widened
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.errors import UnsupportedLayerError


@dataclass(frozen=True)
class Site:
    """A cut of the graph: from query, keys [B, Hkv, T, D] and values to the output."""

    layer: int
    out: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node

    def feed(self, k: Tensor, v: Tensor, past: int) -> dict[fx.Node, Tensor]:
        """Values of the nodes that bring in keys and values [B, Hkv, T, D], ``past`` cached."""
        return {self.key: k, self.value: v}

    @property
    def room(self) -> int:
        """Keys that can be put in; 0 for any number."""
        return 0

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
    raise unknown_site(layer, f"{node.name} has shape {shape}, which is no layout of heads")


def unknown_site(layer: int, why: str) -> UnsupportedLayerError:
    """The refusal of a site."""
    return UnsupportedLayerError(
        "an attention layer cannot be captured",
        where=f"layer {layer}",
        why=why,
        do="Only causal and sliding-window softmax attention is supported.",
    )


class SiteFunction:
    """The site as a function of tensors in head layout, on the model's device, in float32 where
    the model is in half precision."""

    def __init__(self, gm: fx.GraphModule, site: Site) -> None:
        self.gm, self.site = gm, site
        query, key, value = (n.meta["val"] for n in (site.query, site.key, site.value))
        self.query_heads = query.shape[1 if site.query_layout == "bhsd" else 2]
        self.kv_heads, self.width, self.out_width = key.shape[1], key.shape[3], value.shape[3]
        self.dtype, self.device = widened(key.dtype), key.device

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, Hq, S, Dv]; the past length is what the keys have more than the queries."""
        tokens = q.shape[2]
        query = q if self.site.query_layout == "bhsd" else q.transpose(1, 2)
        values = {
            **input_values(self.gm, k.shape[2] - tokens, tokens, q.shape[0]),
            self.site.query: query,
            **self.site.feed(k, v, k.shape[2] - tokens),
        }
        with torch.no_grad():
            run = Evaluator(self.gm, values, widen=self.site.key.meta["val"].dtype)
            out = run(self.site.out)
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
