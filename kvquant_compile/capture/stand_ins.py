"""Values for the inputs of a captured graph that put new tokens at given positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kvquant_compile.capture.embedding import EXTRA_INPUTS


def input_values(gm: fx.GraphModule, past: int, tokens: int, batch: int) -> dict[fx.Node, Any]:
    """Values of the placeholders; embedded tokens are zeros, and nothing is padding.

    Args:
        gm: a captured graph, or one on the way to it: inputs of other names get no value.
        past: tokens before the new ones.
        tokens, batch: sizes.
    """
    values: dict[fx.Node, Any] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        fake = node.meta.get("val")
        device = fake.device if isinstance(fake, Tensor) else None
        if node.target == "past":
            values[node] = past
        elif node.target == "ids":
            values[node] = torch.zeros(batch, tokens, dtype=torch.long, device=device)
        elif node.target == "position_ids":
            values[node] = torch.arange(past, past + tokens, device=device).repeat(batch, 1)
        elif node.target == "attention_mask":
            values[node] = torch.ones(batch, past + tokens, dtype=torch.long, device=device)
        elif node.target in ("hidden", *EXTRA_INPUTS) and isinstance(fake, Tensor):
            size = batch, tokens, *map(int, fake.shape[2:])
            values[node] = torch.zeros(size, dtype=fake.dtype, device=device)
    return values
