"""The captured graph against the original backbone, at several lengths and with padding."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvquant_compile.capture.capture_cache import Firings
from kvquant_compile.capture.embedding import random_embedded
from kvquant_compile.capture.hf_hooks import attention_by
from kvquant_compile.capture.own_cache import CacheKind
from kvquant_compile.capture.rounding import Disturb, widened_limit
from kvquant_compile.capture.run import Store, run_marked
from kvquant_compile.errors import UnsupportedModelError

# Windows up to this many tokens are crossed during the check; larger ones would cost too much.
_CROSS = 128
# Layers that rounding may accumulate over within these limits; like a random walk beyond.
_USUAL_LAYERS = 8
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Original:
    """A backbone, a parameter of it, and how its cache is made."""

    backbone: PreTrainedModel
    like: Tensor
    caches: CacheKind


def self_check(
    gm: fx.GraphModule, original: Original, seen: Firings, *, mask_optional: bool
) -> dict[str, Any]:
    """Compare graph and backbone over whole conversations: (tokens, past) grows call by call.

    Returns:
        JSON-able evidence: the lengths tried and the largest relative error.

    Raises:
        UnsupportedModelError: they differ; the graph then holds for the traced length only.
    """
    windows = [kind.window for kind in seen.masks if 0 < kind.window <= _CROSS]
    first = max([6, *(window + 3 for window in windows)])
    talks = [_Talk(2, (first, 1, 3), padded=True), _Talk(2, (1, 4, 2))]
    talks += [_Talk(1, (5, 1), masked=False)] if mask_optional else []
    backbone, dtype = original.backbone, original.like.dtype
    # Some releases drop the soft-cap in "sdpa": the model's definition is then "eager".
    for reference in (backbone.config._attn_implementation, "eager"):
        with attention_by(backbone, reference):
            errors = [e for talk in talks for e in _compare(gm, original, talk)]
            worst = max(error for _, error in errors)
            limit = TOLERANCE[dtype] * max(1.0, seen.attends / _USUAL_LAYERS) ** 0.5
            outputs = functools.partial(_outputs, original, talks)
            limit = widened_limit(limit, worst, dtype, outputs)
        if worst <= limit:
            break
    lengths = [[tokens, past] for (tokens, past), _ in errors]
    if not worst <= limit:
        bad = [length for length, error in errors if not error <= limit]
        raise _refused(backbone, _contradiction(original, talks, limit) or
            f"the captured graph differs from it at (tokens, past) = {bad}: relative error"
            f" {worst:.1e}")  # fmt: skip
    return {
        "reference": reference,
        "lengths": lengths,
        "relative_error": worst,
        "appends": seen.appends,
        "attends": seen.attends,
        "masks": [[kind.kind, kind.window] for kind in seen.masks],
    }


def _refused(backbone: PreTrainedModel, why: str) -> UnsupportedModelError:
    name = type(backbone).__name__
    do = "Report the model; nothing was changed."
    return UnsupportedModelError(f"{name} cannot be captured", why=why, do=do)


@dataclass(frozen=True)
class _Talk:
    """A conversation: so many tokens a call; ``padded`` columns lead the first row."""

    batch: int
    calls: tuple[int, ...]
    padded: bool = False
    masked: bool = True

    def steps(self, original: Original) -> Iterator[_Step]:
        """Random embedded tokens, the same whenever it is asked."""
        total, past, like = sum(self.calls), 0, original.like
        fed = random_embedded(original.backbone, like, self.batch, total, seed=1)
        mask = torch.ones(self.batch, total, dtype=torch.long, device=like.device)
        if self.padded:
            mask[0, :2] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for tokens in self.calls:
            now = slice(past, past + tokens)
            known = mask[:, : past + tokens] if self.masked else None
            extra = {name: value[:, now] for name, value in fed.items()}
            hidden = extra.pop("hidden")
            yield _Step(hidden, known, positions[:, now], extra, mask[:, now].bool(), past)
            past += tokens


@dataclass(frozen=True, eq=False)
class _Step:
    """One call: embedded tokens, 2-D mask or None, positions, what else the backbone asks for,
    which tokens are real, and how many came before."""

    hidden: Tensor
    mask: Tensor | None
    positions: Tensor
    extra: dict[str, Tensor]
    real: Tensor
    past: int


def _compare(
    gm: fx.GraphModule, original: Original, talk: _Talk
) -> list[tuple[tuple[int, int], float]]:
    """((tokens, past), relative error) of every call."""
    store: Store = {}
    expected = _outputs(original, [talk], lambda hidden: hidden)
    errors = []
    for step, wanted in zip(talk.steps(original), expected, strict=True):
        inputs = (step.hidden, step.mask, step.positions, step.past, *step.extra.values())
        got = _captured(gm, original, talk, store, *inputs)
        size = (step.hidden.shape[1], step.past)
        errors.append((size, relative_error(got[step.real], wanted)))
    return errors


def _outputs(original: Original, talks: Sequence[_Talk], disturb: Disturb) -> list[Tensor]:
    """What the original gives for the real tokens of every call."""
    outputs = []
    for talk in talks:
        cache = original.caches.new()
        for step in talk.steps(original):
            # A copy: some models scale what they are given in place.
            hidden = disturb(step.hidden.clone())
            outputs.append(_original(original.backbone, cache, hidden, step)[step.real])
    return outputs


def _contradiction(original: Original, talks: Sequence[_Talk], limit: float) -> str:
    """In which step the original itself gives other results than at once, padded if only then."""
    plain = [replace(talk, padded=False) for talk in talks if talk.padded]
    for talk in [*plain, *talks]:
        whole = replace(talk, calls=(sum(talk.calls),))
        steps = _outputs(original, [talk], lambda hidden: hidden)
        (once,) = _outputs(original, [whole], lambda hidden: hidden)
        (real,) = (step.real for step in whole.steps(original))
        places = torch.zeros_like(real, dtype=torch.long)
        places[real] = torch.arange(len(once), device=real.device)
        parts = places.split(talk.calls, 1)
        kept = real.split(talk.calls, 1)
        for i, (part, those, got) in enumerate(zip(parts, kept, steps, strict=True)):
            error = relative_error(got, once[part[those]])
            if not error <= max(limit, 1e-3):
                kind = "in a left-padded batch" if talk.padded else "without padding"
                return (f"the original contradicts itself: {kind}, {talk.calls[i]} tokens after"
                        f" {sum(talk.calls[:i])} have other results than all given at once"
                        f" (relative error {error:.1e}), so what it attends to, or keeps, is not"
                        " what its cache holds")  # fmt: skip
    return ""


def _captured(
    gm: fx.GraphModule, original: Original, talk: _Talk, store: Store, *inputs: Any
) -> Tensor:
    try:
        output: Tensor = run_marked(gm, store, *inputs)
        return output
    except Exception as error:
        why = f"the captured graph holds for the traced length only: {_first_line(error)}"
        limit = TOLERANCE[original.like.dtype]
        why = _contradiction(original, [talk], limit) or why
        raise _refused(original.backbone, why) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _original(
    backbone: PreTrainedModel, cache: DynamicCache, hidden: Tensor, step: _Step
) -> Tensor:
    takes = inspect.signature(backbone.forward).parameters
    named = {"attention_mask": step.mask, "position_ids": step.positions, **step.extra}
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
