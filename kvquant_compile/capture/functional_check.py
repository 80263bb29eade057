"""The captured graph of a hand-written decoder against the decoder itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from kvquant_compile.capture.hf_selfcheck import TOLERANCE, relative_error
from kvquant_compile.capture.run import Store, run_marked
from kvquant_compile.errors import UnsupportedModelError

if TYPE_CHECKING:
    from kvquant_compile.capture.decoder import Decoder


def self_check(
    gm: fx.GraphModule, decoder: Decoder, dtype: torch.dtype, mask_assumed: bool
) -> dict[str, Any]:
    """Compare logits over a conversation of calls (tokens, past).

    A decoder that handles several tokens after a past wrongly by itself (``is_causal=True``
    counts keys from the first one) is compared only where it agrees with its own prefill.

    Raises:
        UnsupportedModelError: graph and decoder differ.
    """
    ids = decoder.ids
    whole = decoder.prefill(ids)
    errors: dict[tuple[int, int], float] = {}
    skipped = []
    for calls in ((6, 1, 1, 3), (4, 1, 2)):
        store: Store = {}
        cache, past = decoder.empty(), 0
        for tokens in calls:
            now = slice(past, past + tokens)
            try:
                expected, cache = decoder.call(ids[:, now], cache)
            except Exception:  # it takes one token at a time only
                skipped.append([tokens, past])
                break
            got = run_marked(gm, store, ids[:, now], past)
            if relative_error(expected, whole[:, now]) <= TOLERANCE[dtype]:
                errors[tokens, past] = relative_error(got, expected)
            else:
                skipped.append([tokens, past])
            past += tokens
    lone = run_marked(gm, {}, ids[:1, :1], 0)
    errors[1, 0] = relative_error(lone, decoder.prefill(ids[:, :1])[:1])
    _refuse_if_wrong(type(decoder.model).__name__, errors, dtype)
    return {"lengths": [list(k) for k in errors], "relative_error": max(errors.values()),
            "mask_assumed": mask_assumed, "inconsistent_in_original": skipped}  # fmt: skip


def _refuse_if_wrong(name: str, errors: dict[tuple[int, int], float], dtype: torch.dtype) -> None:
    bad = [list(k) for k, error in errors.items() if not error <= TOLERANCE[dtype]]
    decoded = [k for k in errors if k[1] > 0]
    if bad or not decoded:
        raise UnsupportedModelError(
            f"{name} cannot be captured",
            why="its decoding does not agree with its own prefill" if not decoded else
            f"the captured graph differs from it at (tokens, past) = {bad}",
            do="Check the mask of the decoder with a past; nothing was changed.",
        )  # fmt: skip
