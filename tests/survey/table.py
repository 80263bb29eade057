"""The survey as a page: counts first, then what is refused and why, then every type."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tests.survey.case import AFTER_ROPE, FAILED, REFUSED, REWRITTEN, WRONG, Outcome

_WORDS = {
    REWRITTEN: "rewritten: keys before RoPE, or never rotated",
    AFTER_ROPE: "rewritten: keys behind RoPE (`strict=False`)",
    REFUSED: "refused",
    WRONG: "**wrong**",
    FAILED: "not built here",
}


def markdown(
    outcomes: Sequence[Outcome],
    versions: Mapping[str, str],
    half: Mapping[str, str] | None = None,
    times: Mapping[str, Any] | None = None,
) -> str:
    """The page; with what half precision and the clock have shown, where given."""
    return "\n".join([
        "# Survey: every causal language model of transformers",
        "",
        f"`python scripts/survey.py`, transformers {versions['transformers']}, torch"
        f" {versions['torch']}; [numbers](results/survey.json). Every type is built tiny from its"
        " default configuration, with random weights, captured, proved, rewritten, and compared"
        " with the original: prefill, decode, a left-padded batch, windows crossed, `generate`"
        " with lossless pages token by token, and 3-bit generation.",
        "",
        *_counts(outcomes),
        "",
        *_reasons(outcomes),
        "",
        *_half(half or {}),
        *_times((times or {}).get("rows", [])),
        *_rows(outcomes),
        "",
    ])  # fmt: skip


def _counts(outcomes: Sequence[Outcome]) -> list[str]:
    with_cache = [o for o in outcomes if o.outcome != FAILED and not o.without_cache]
    counts = Counter(o.outcome for o in with_cache)
    lines = ["| | types |", "| --- | ---: |", f"| in the mapping | {len(outcomes)} |"]
    missing = [o for o in outcomes if o.outcome == FAILED]
    lines += [
        f"| {_WORDS[FAILED]} | {len(missing)} |",
        f"| no key-value cache | {len(outcomes) - len(missing) - len(with_cache)} |",
        f"| **have one** | **{len(with_cache)}** |",
    ]
    shown = (REWRITTEN, AFTER_ROPE, REFUSED, WRONG)
    return lines + [f"| {_WORDS[kind]} | {counts[kind]} |" for kind in shown]


def _half(found: Mapping[str, str]) -> list[str]:
    """How models loaded in bfloat16 and float16 compare."""
    if not found:
        return []
    other = [name for name, said in found.items() if said != "as float32"]
    lines = ["## Half precision", "",
             f"`python scripts/survey.py --half`: of {len(found)} types saved and loaded in"
             f" bfloat16 and in float16, {len(found) - len(other)} are rewritten with the plans of"
             " float32, frequencies to the bit, and validated."]  # fmt: skip
    return [*lines, *(f"* {name}: {found[name]}" for name in other), ""]


def _times(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Seconds and memory of capture and proof."""
    if not rows:
        return []
    lines = ["## Time and memory", "",
             "`python scripts/capture_time.py`: a Llama of small width, seconds of one processor,"
             " and what the process grew by (no copy of the weights is made).", "",
             "| layers | capture | recognise and prove | weights | grown by |",
             "| ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for r in rows:
        lines.append(f"| {r['layers']} | {r['capture_s']:.1f} s | {r['proof_s']:.1f} s |"
                     f" {r['weights_mb']:.0f} MB | {r['grown_mb']:.0f} MB |")  # fmt: skip
    return [*lines, ""]


def _reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """Why a type is not rewritten in the best way, types with one reason together."""
    found: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.outcome != REWRITTEN:
            found[outcome.outcome, _general(outcome.why)].append(outcome)
    lines = ["## What is not, and why", ""]
    for (kind, reason), alike in sorted(found.items(), key=lambda item: -len(item[1])):
        names = ", ".join(outcome.model_type for outcome in alike)
        own = re.sub(r"^\w+Error: ", "", alike[0].why)  # with its source line
        lines.append(f"* {kind}: {names}. {own if len(alike) == 1 else reason}")
    return lines


def _general(reason: str) -> str:
    """A refusal without the names and numbers that differ from type to type."""
    reason = re.sub(r"^\w+Error: ", "", reason)
    reason = re.sub(r"^\w+ cannot be captured", "it cannot be captured", reason)
    reason = re.sub(r" \[[^\]]*\]:", ":", reason)
    reason = re.sub(r"\b(layer|query|key) \d+\b", r"\1 n", reason)
    return re.sub(r"\b(transpose|mul|view|permute|add|type_as|to)_\d+\b", r"\1", reason)


def _rows(outcomes: Sequence[Outcome]) -> list[str]:
    lines = ["## Every type", "", "| type | outcome | rotation of its keys | error | generate |",
             "| --- | --- | --- | ---: | --- |"]  # fmt: skip
    for o in outcomes:
        rope = ", ".join(dict.fromkeys(o.rope))
        error = f"{o.relative_error:.0e}" if o.rope else ""
        lines.append(f"| {o.model_type} | {o.outcome} | {rope} | {error} | {o.generated} |")
    return lines
