"""Translation validation: with lossless pages the rewritten model must equal the original.

It separates compiler bugs from quantisation error, and runs on every ``optimize``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvquant_compile.calib.data import vocabulary
from kvquant_compile.capture.captured import Captured
from kvquant_compile.capture.embedding import embedded
from kvquant_compile.capture.hf_hooks import attention_by
from kvquant_compile.capture.rounding import Disturb, widened_limit
from kvquant_compile.codec.layout import lossless_spec
from kvquant_compile.errors import ValidationError
from kvquant_compile.logs import logger
from kvquant_compile.passes.recognise import MatchedLayer
from kvquant_compile.runtime.program import Program, build_program

_log = logger("runtime")
STEPS = (7, 1, 70)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Relative error by dtype that rounding may cause in up to ``USUAL_LAYERS`` layers."""

USUAL_LAYERS = 8


def lossless_program(captured: Captured, layers: Sequence[MatchedLayer]) -> Program:
    """The rewritten model whose pages hold raw keys and values."""
    indices = [layer.plan.index for layer in layers]
    specs, tables = dict.fromkeys(indices, lossless_spec()), dict.fromkeys(indices)
    return build_program(captured, layers, specs, tables)


def validate_lossless(captured: Captured, layers: Sequence[MatchedLayer]) -> dict[str, float]:
    """Compare the rewritten model with the original over prefill, decode and a long step.

    Returns:
        case -> relative error of the graph's output (norm of the difference over the norm).

    Raises:
        ValidationError: an error exceeds the dtype's tolerance.
    """
    program = lossless_program(captured, layers)
    decoder = captured.decoder
    padded = [0, 3] if decoder is None else [0] * decoder.ids.shape[0]
    errors: dict[str, float] = {}
    undisturbed = contextlib.nullcontext() if decoder is None else decoder.undisturbed()
    with torch.no_grad(), undisturbed:
        for exact in (True, False):
            name = "exact chunk" if exact else "through pages"
            errors |= _compare(captured, program, padded, exact, name)
    # rounding errors of layers add up like a random walk; a wrong rewrite is off by far more
    depth = max(1.0, len(layers) / USUAL_LAYERS)
    limit = TOLERANCE.get(captured.dtype, 1e-4) * depth**0.5
    worst = max(errors, key=lambda case: errors[case])
    if captured.convention == "transformers":
        with torch.no_grad():
            original = functools.partial(_outputs, captured, padded)
            limit = widened_limit(limit, errors[worst], captured.dtype, original)
    if captured.caches is not None:
        captured.caches.forget()
    if not errors[worst] <= limit:
        raise ValidationError(
            "the rewritten model differs from the original",
            where=worst,
            why=f"relative error {errors[worst]:.2e} with lossless storage, limit {limit:.0e}",
            do=f"Nothing was changed. {_advice(captured)}",
        )
    return errors


def _advice(captured: Captured) -> str:
    classes = {c for p in captured.model.parameters() for c in (type(p), type(p.detach()))}
    kinds = {c.__name__ for c in classes - {Tensor, nn.Parameter}}
    if kinds:
        return (
            f"Its weights are quantised ({', '.join(sorted(kinds))}); where their layers round"
            " activations too, two correct results differ: quantise weights only."
        )
    return "Please report the model type; this is a bug of the compiler."


def _compare(
    captured: Captured, program: Program, padding: list[int], exact: bool, name: str
) -> dict[str, float]:
    """Run both over the same steps; row i starts with ``padding[i]`` padded columns."""
    cache, past, errors = program.new_cache(), None, {}
    for ids, seen, positions, real, done in _steps(captured, padding):
        expected, past = _original(captured, ids, seen, positions, past)
        hidden = _inputs(captured, ids, seen, positions, done)
        got = program.run(hidden, cache, positions, seen, exact)
        difference = (got - expected)[real].float().norm()
        case = f"{name}, {ids.shape[1]} tokens after {done}"
        errors[case] = float(difference / expected[real].float().norm())
        _log.debug("lossless rewrite, %s: relative error %.1e", case, errors[case])
    return errors


def _steps(
    captured: Captured, padding: list[int]
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor, int]]:
    """(ids, mask or None, positions, which are real, tokens before) of every step."""
    generator = torch.Generator().manual_seed(0)
    device, batch = captured.device, len(padding)
    lengths = _lengths(captured)
    mask = torch.ones(batch, sum(lengths), dtype=torch.int64, device=device)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    places, done = (mask.cumsum(1) - 1).clamp(min=0), 0
    for steps in lengths:
        ids = torch.randint(vocabulary(captured.model), (batch, steps), generator=generator)
        now = slice(done, done + steps)
        seen = mask[:, : now.stop] if any(padding) else None
        yield ids.to(device), seen, places[:, now], mask[:, now].bool(), done
        done += steps


def _lengths(captured: Captured) -> tuple[int, ...]:
    """Tokens of every step; fewer where a decoder has no room for all."""
    if captured.decoder is None:
        return STEPS
    return *STEPS[:-1], captured.decoder.longest(sum(STEPS)) - sum(STEPS[:-1])


def _outputs(captured: Captured, padding: list[int], disturb: Disturb) -> list[Tensor]:
    """What the original gives for real tokens whose embeddings are disturbed."""
    backbone: Any = captured.backbone
    embedding = backbone.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: disturb(output))
    outputs, past = [], None
    try:
        for ids, seen, positions, real, _ in _steps(captured, padding):
            output, past = _original(captured, ids, seen, positions, past)
            outputs.append(output[real])
    finally:
        hook.remove()
    return outputs


def _inputs(
    captured: Captured, ids: Tensor, mask: Tensor | None, positions: Tensor, past: int
) -> dict[str, Any]:
    if captured.convention == "functional":
        return {"ids": ids, "past": past}
    backbone: Any = captured.backbone
    fed = embedded(backbone, ids)
    return {**fed, "attention_mask": mask, "position_ids": positions, "past": past}


def _original(
    captured: Captured, ids: Tensor, mask: Tensor | None, positions: Tensor, past: Any
) -> tuple[Tensor, Any]:
    """The original's output and its grown cache.

    A functional decoder is asked for everything so far at once: some handle several tokens after
    a past wrongly (``is_causal=True`` counts keys from the first), and capture went by their
    prefill.
    """
    if captured.decoder is not None:
        everything = ids if past is None else torch.cat([past, ids], 1)
        return captured.decoder.prefill(everything)[:, -ids.shape[1] :], everything
    if past is None:
        assert captured.caches is not None
        past = captured.caches.new()
    backbone: Any = captured.backbone
    with attention_by(backbone, str(captured.evidence["reference"])):
        result = backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        )
    return result.last_hidden_state, past
