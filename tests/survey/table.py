"""The survey as a page: counts first, then what is refused and why, then every type."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from tests.survey.case import AFTER_ROPE, FAILED, REFUSED, REWRITTEN, WRONG, Outcome

_WORDS = {
    REWRITTEN: "rewritten: keys before RoPE, or never rotated",
    AFTER_ROPE: "rewritten: keys behind RoPE (`strict=False`)",
    REFUSED: "refused",
    WRONG: "**wrong**",
    FAILED: "not built here",
}


def markdown(outcomes: Sequence[Outcome], versions: Mapping[str, str]) -> str:
    """The page."""
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


def _reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """Why a type is not rewritten in the best way, types with one reason together."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.outcome != REWRITTEN:
            found[outcome.outcome, _general(outcome.why)].append(outcome.model_type)
    lines = ["## What is not, and why", ""]
    for (kind, reason), types in sorted(found.items(), key=lambda item: -len(item[1])):
        lines.append(f"* {kind}: {', '.join(types)}. {reason}")
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
