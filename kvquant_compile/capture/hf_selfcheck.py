"""The captured graph against the original backbone, at several lengths and with padding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvquant_compile.capture.capture_cache import Firings
from kvquant_compile.capture.embedding import PER_LAYER, random_embedded
from kvquant_compile.capture.hf_hooks import attention_by
from kvquant_compile.capture.run import Store, run_marked
from kvquant_compile.errors import UnsupportedModelError

# Windows up to this many tokens are crossed during the check; larger ones would cost too much.
_CROSS = 128
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def self_check(
    gm: fx.GraphModule,
    backbone: PreTrainedModel,
    like: Tensor,
    seen: Firings,
    *,
    mask_optional: bool,
) -> dict[str, Any]:
    """Compare graph and backbone over whole conversations: (tokens, past) grows call by call.

    Returns:
        JSON-able evidence: the lengths tried and the largest relative error.

    Raises:
        UnsupportedModelError: they differ; the graph then holds for the traced length only.
    """
    windows = [kind.window for kind in seen.masks if 0 < kind.window <= _CROSS]
    first = max([6, *(window + 3 for window in windows)])
    talks: list[tuple[int, tuple[int, ...], bool]] = [
        (2, (first, 1, 3), True),
        (2, (1, 4, 2), False),
    ]
    talks += [(1, (5, 1), False)] if mask_optional else []
    # Some releases drop the soft-cap in "sdpa": the model's definition is then "eager".
    for reference in (backbone.config._attn_implementation, "eager"):
        errors = []
        with attention_by(backbone, reference):
            for batch, calls, padded in talks:
                errors += _conversation(gm, backbone, like, batch, calls, padded, batch > 1)
        worst = max(error for _, error in errors)
        if worst <= TOLERANCE[like.dtype]:
            break
    lengths = [[tokens, past] for (tokens, past), _ in errors]
    if not worst <= TOLERANCE[like.dtype]:
        bad = [length for length, error in errors if not error <= TOLERANCE[like.dtype]]
        raise UnsupportedModelError(
            f"{type(backbone).__name__} cannot be captured",
            why=f"the captured graph differs from it at (tokens, past) = {bad}: relative error"
            f" {worst:.1e}",
            do="Report the model; nothing was changed.",
        )
    return {
        "reference": reference,
        "lengths": lengths,
        "relative_error": worst,
        "appends": seen.appends,
        "attends": seen.attends,
        "masks": [[kind.kind, kind.window] for kind in seen.masks],
    }


def _conversation(
    gm: fx.GraphModule,
    backbone: PreTrainedModel,
    like: Tensor,
    batch: int,
    calls: tuple[int, ...],
    padded: bool,
    given_mask: bool,
) -> list[tuple[tuple[int, int], float]]:
    total = sum(calls)
    fed = random_embedded(backbone, like, batch, total, seed=1)
    mask = torch.ones(batch, total, dtype=torch.long, device=like.device)
    if padded:
        mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    store: Store = {}
    cache = DynamicCache(config=backbone.config.get_text_config(decoder=True))
    errors, past = [], 0
    for tokens in calls:
        now = slice(past, past + tokens)
        known = mask[:, : past + tokens] if given_mask else None
        hidden, *extra = (value[:, now] for value in fed.values())
        inputs = (hidden, known, positions[:, now])
        # A copy: some models scale what they are given in place.
        expected = _original(backbone, cache, hidden.clone(), *inputs[1:], *extra)
        got = _captured(gm, backbone, store, *inputs, past, *extra)
        real = mask[:, now].bool()
        errors.append(((tokens, past), relative_error(got[real], expected[real])))
        past += tokens
    return errors


def _captured(gm: fx.GraphModule, backbone: PreTrainedModel, store: Store, *inputs: Any) -> Tensor:
    try:
        output: Tensor = run_marked(gm, store, *inputs)
        return output
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} cannot be captured",
            why=f"the captured graph holds for the traced length only: {_first_line(error)}",
            do="Report the model; nothing was changed.",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _original(
    backbone: PreTrainedModel,
    cache: DynamicCache,
    hidden: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    per_layer: Tensor | None = None,
) -> Tensor:
    takes = inspect.signature(backbone.forward).parameters
    named = {"attention_mask": mask, "position_ids": positions}
    if per_layer is not None:
        named[PER_LAYER] = per_layer
    out = backbone(
        inputs_embeds=hidden, past_key_values=cache, use_cache=True,
        **{name: value for name, value in named.items() if name in takes},
    )  # fmt: skip
    return out.last_hidden_state


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor; nan counts as infinite."""
    if got.shape != expected.shape:
        return float("inf")
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float("inf") if bool(error.isnan()) else float(error)
