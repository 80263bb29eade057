"""What becomes of a mutant, and whether that is right by definitions that the compiler lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvquant_compile.capture import Captured, capture
from kvquant_compile.capture.run import Evaluator
from kvquant_compile.capture.stand_ins import input_values
from kvquant_compile.errors import KVQuantError, ValidationError
from kvquant_compile.passes import MatchedLayer, recognise
from kvquant_compile.passes.head_view import HeadView
from kvquant_compile.plan import RopeSpec
from kvquant_compile.runtime.validate import validate_lossless
from tests.mutation.edits import Edit, compiled, edits
from tests.mutation.originals import Original
from tests.zoo import tokens

# In the order of a report.
BEFORE, BEHIND, REFUSED = "rewritten, proved", "rewritten behind RoPE", "refused"
STILLBORN, SAME = "does not run", "changes nothing"
FALSE, CRASH = "FALSELY ACCEPTED", "CRASHED"
WRONG = (FALSE, CRASH)
VERDICTS = (BEFORE, BEHIND, REFUSED, STILLBORN, SAME, *WRONG)


@dataclass(frozen=True)
class Mutant:
    """One edit of one function of an original."""

    original: Original
    owner: Any
    name: str
    edit: Edit

    def __str__(self) -> str:
        place = f"{self.original.name}.{self.name}"
        return f"{place}: {self.edit.kind}: {' '.join(self.edit.where.split())}"


@dataclass(frozen=True)
class Outcome:
    """A mutant's verdict, and the reason given."""

    mutant: Mutant
    verdict: str
    reason: str = ""


def mutants(original: Original) -> Iterator[Mutant]:
    """Every mutant of an original."""
    for owner, names in original.functions:
        for name in names:
            for edit in edits(getattr(owner, name), original.about):
                yield Mutant(original, owner, name, edit)


@contextmanager
def patched(mutant: Mutant) -> Iterator[None]:
    """The edited function in the place of the original."""
    before = vars(mutant.owner)[mutant.name]
    function = compiled(getattr(mutant.owner, mutant.name), mutant.edit)
    static = isinstance(before, staticmethod)
    setattr(mutant.owner, mutant.name, staticmethod(function) if static else function)
    try:
        yield
    finally:
        setattr(mutant.owner, mutant.name, before)


def judge(mutant: Mutant, model: nn.Module, unchanged: Tensor) -> Outcome:
    """Run the compiler's passes on a mutant and check what they make of it.

    Args:
        mutant: the edit.
        model: the original's model.
        unchanged: :func:`outputs` of the model before the edit.
    """
    with patched(mutant):
        try:
            now = outputs(mutant.original, model)
        except Exception as error:
            return Outcome(mutant, STILLBORN, str(error))
        if not bool(now.isfinite().all()):
            return Outcome(mutant, STILLBORN, "not finite")
        if now.shape != unchanged.shape:
            return Outcome(mutant, STILLBORN, "another shape")
        if torch.allclose(now, unchanged, rtol=1e-6, atol=1e-6):
            return Outcome(mutant, SAME)
        try:
            return _compiled(mutant, model)
        except Exception as error:  # no error of the library: what it did not foresee
            return Outcome(mutant, CRASH, f"{type(error).__name__}: {error}")


def outputs(original: Original, model: nn.Module) -> Tensor:
    """Logits of a prefill and of a step after it, [2, 13, vocab]."""
    ids = tokens(2, 13)
    with torch.no_grad():
        if original.handwritten:
            first, past = model(ids[:, :12], None)
            return torch.cat([first, model(ids[:, 12:], past)[0]], 1)
        first = model(ids[:, :12], use_cache=True)
        step = model(ids[:, 12:], past_key_values=first.past_key_values)
        return torch.cat([first.logits, step.logits], 1)


def _compiled(mutant: Mutant, model: nn.Module) -> Outcome:
    try:
        captured = capture(model, (tokens(), None) if mutant.original.handwritten else None)
        layers = recognise(captured)
    except KVQuantError as refusal:
        return Outcome(mutant, REFUSED, str(refusal))
    wrong = [layer for layer in layers if layer.plan.rope and not rotates(captured, layer)]
    if wrong:
        return Outcome(mutant, FALSE, "what was proved is not what the key is")
    try:
        validate_lossless(captured, layers)
    except ValidationError as error:
        return Outcome(mutant, FALSE, str(error))
    reasons = {layer.plan.refusal for layer in layers if layer.plan.refusal}
    if reasons:
        return Outcome(mutant, BEHIND, "; ".join(sorted(reasons)))
    return Outcome(mutant, BEFORE)


def rotates(captured: Captured, layer: MatchedLayer) -> bool:
    """Whether a layer's appended key is the proved rotation of its stored key, on random ones.

    The rotation is computed as complex numbers in float64, which nothing else here does.
    """
    assert layer.plan.rope is not None
    view = HeadView.of(layer.key_pre)
    like = layer.key.meta["val"]
    generator = torch.Generator().manual_seed(1)
    for past, length in ((0, 9), (1, 1), (60, 3), (231, 4)):
        x = torch.randn(2, like.shape[1], length, like.shape[3], generator=generator)
        values = input_values(captured.graph_module, past, length, 2)
        values[view.node] = view.undo(x.to(like.dtype))
        with torch.no_grad():
            got = Evaluator(captured.graph_module, values)(layer.key).double()
        expected = _turned(x.double(), torch.arange(past, past + length), layer.plan.rope)
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3):
            return False
    return True


def _turned(x: Tensor, positions: Tensor, spec: RopeSpec) -> Tensor:
    out = torch.zeros_like(x)
    for (a, b), (c, d), frequency in zip(
        spec.in_pairs, spec.out_pairs, spec.frequencies, strict=True
    ):
        angle = positions.double() * frequency
        turned = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angle), angle)
        out[..., c], out[..., d] = spec.scale * turned.real, spec.scale * turned.imag
    for source, target in spec.passthrough:
        out[..., target] = x[..., source]
    return out
