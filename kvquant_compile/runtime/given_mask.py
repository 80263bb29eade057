"""The padding in an attention mask that a model's own wrapper has made for its backbone.

Multimodal wrappers build the backbone's masks themselves: one of four axes, or one for every kind
of layer. The program has causal masks and windows compiled in; what it needs is which tokens are
padding, and that the mask says no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvquant_compile.capture.reference import exact_mask
from kvquant_compile.errors import OptionError

_FULL = "full_attention"


def padding_of(mask: Tensor | Mapping[str, Tensor | None] | None, past: int) -> Tensor | None:
    """The 2-D padding mask [B, past + S]; None where nothing is padding.

    Args:
        mask: [B, past + S]; or [B, 1, S, past + S], bool or to be added to scores; or such masks
            by kind of layer, of which the one of full attention counts.
        past: cached columns.

    Raises:
        OptionError: the mask hides or shows more than padding and causality do.
    """
    if isinstance(mask, Mapping):
        mask = next((mask[kind] for kind in (_FULL, *mask) if kind in mask), None)
    if mask is None or mask.ndim == 2:
        return mask
    seen = mask if mask.dtype is torch.bool else mask >= 0
    real = seen[:, 0, -1] if mask.ndim == 4 else seen
    if mask.ndim != 4 or not _is_causal(seen, real, past):
        raise OptionError(
            f"an attention mask of shape {tuple(mask.shape)} on an optimised model",
            why="it is not the causal mask with padding, which is compiled in",
            do="Pass the 2-D padding mask [batch, tokens]; tokens that see later ones (images)"
            " need the original model.",
        )
    return None if bool(real.all()) else real


def _is_causal(seen: Any, real: Tensor, past: int) -> bool:
    """Whether a mask [B, 1, S, past + S] is causal but for padding, whose rows do not count."""
    batch, _, steps, columns = seen.shape
    if columns != past + steps:
        return False
    expected = exact_mask(real, batch, steps, past, 0, seen.device)
    rows = real[:, None, past:, None]
    return bool(((seen == expected) | ~rows).all())
