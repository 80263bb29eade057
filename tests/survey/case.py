"""What happens to one model type: built, captured, proved, rewritten, validated, generated with."""

from __future__ import annotations

import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvquant_compile
from kvquant_compile.errors import KVQuantError
from kvquant_compile.runtime.installed import installed
from tests.survey.shrink import tiny_config
from tests.zoo import randomise

REWRITTEN, AFTER_ROPE, REFUSED, WRONG, FAILED = (
    "rewritten", "rewritten after RoPE", "refused", "wrong", "not built",
)  # fmt: skip
_PROMPT, _NEW = 11, 6


@dataclass
class Outcome:
    """One row of the survey.

    Attributes:
        model_type: transformers' name.
        outcome: ``rewritten`` (keys stored before RoPE, or never rotated), ``rewritten after
            RoPE``, ``refused``, ``wrong`` (accepted and not the original, or an exception that
            is none of ours) or ``not built``
            (by us, or the original does not run).
        why: the refusal or failure.
        rope: how each layer's keys are rotated.
        relative_error: worst one of the lossless validation.
        generated: whether ``generate`` gives the original's tokens with lossless pages, and runs
            with 3 bits; None where it was not asked.
        seconds: of all stages.
    """

    model_type: str
    outcome: str
    why: str = ""
    rope: list[str] = field(default_factory=list)
    relative_error: float = 0.0
    generated: str = ""
    seconds: float = 0.0

    @property
    def without_cache(self) -> bool:
        """Whether the type was refused because it keeps no key-value cache."""
        return self.outcome == REFUSED and "is no decoder with a key-value" in self.why

    @property
    def failed(self) -> bool:
        """Whether something was accepted that is not the original."""
        return self.outcome == WRONG or self.generated not in ("", "yes")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def build(model_type: str) -> PreTrainedModel:
    """A tiny model with every parameter random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    return randomise(model).eval()


def examine(model_type: str, *, generate: bool = True) -> Outcome:
    """All stages for one type; never raises."""
    start = time.perf_counter()
    try:
        model = build(model_type)
        expected = _generate(model) if generate else None
    except Exception as error:
        return Outcome(model_type, FAILED, _one_line(error))
    outcome = _examine(model_type, model, expected)
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def _examine(model_type: str, model: PreTrainedModel, expected: torch.Tensor | None) -> Outcome:
    try:
        kvquant_compile.optimize(model, bits=16, strict=False, progress=False)
        state = installed(model)
        after = [layer.plan for layer in state.layers if layer.plan.refusal]
        outcome = Outcome(model_type, AFTER_ROPE if after else REWRITTEN)
        outcome.why = after[0].refusal if after else ""
        outcome.rope = [_rope(layer.plan) for layer in state.layers]
        outcome.relative_error = max(state.report.validation.values())
        if expected is not None:
            outcome.generated = _same(expected, model)
    except KVQuantError as error:
        return Outcome(model_type, REFUSED, f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome(model_type, WRONG, _one_line(error))
    return outcome


def _rope(plan: Any) -> str:
    if plan.rope is None:
        return "after RoPE" if plan.refusal else "none"
    return f"{plan.rope.pairing} {2 * len(plan.rope.in_pairs)}/{plan.rope.width}"


def _same(expected: torch.Tensor, model: PreTrainedModel) -> str:
    got = _generate(model)
    if not torch.equal(got, expected):
        return "lossless generation differs"
    kvquant_compile.restore(model)
    text = torch.randint(3, 100, (4, 64), generator=torch.Generator().manual_seed(1))
    kvquant_compile.optimize(
        model, bits=3, strict=False, calibration=text, sensitivity="none", progress=False
    )
    short = _generate(model)
    return "yes" if short.shape == expected.shape else "3 bits stop early"


def _generate(model: PreTrainedModel) -> torch.Tensor:
    """Greedy tokens for a left-padded batch; the window is crossed."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 100, (2, _PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False,
        pad_token_id=0, use_cache=True,
    )  # fmt: skip


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


def in_child(work: Callable[[], Outcome], name: str, limit: int) -> Outcome:
    """Run in a forked child: neither a crash nor an endless loop stops the survey."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(limit)
            warnings.simplefilter("ignore")
            os.close(read)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if not data:
        return Outcome(name, WRONG, f"the process ended with signal {os.WTERMSIG(status)}")
    result = pickle.loads(data)
    assert isinstance(result, Outcome)
    return result
