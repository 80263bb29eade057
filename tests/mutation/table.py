"""Judge mutants of every original and write what became of them.

``python -m tests.mutation.table [--sample 60] [--out mutants.json]``; 0 for all of them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.mutation.originals import Original, originals
from tests.mutation.verdict import (
    BEFORE,
    BEHIND,
    CRASH,
    FALSE,
    REFUSED,
    VERDICTS,
    Mutant,
    Outcome,
    judge,
    mutants,
    outputs,
)

# What reaches the compiler and is different from its original.
LIVE = (BEFORE, BEHIND, REFUSED, FALSE, CRASH)


def sample(original: Original, count: int) -> list[Mutant]:
    """``count`` mutants, evenly spaced; all of them for 0."""
    every = list(mutants(original))
    if not count or count >= len(every):
        return every
    return [every[i * len(every) // count] for i in range(count)]


def judge_original(original: Original, count: int) -> list[Outcome]:
    """The outcomes of a sample of its mutants."""
    model = original.build()
    unchanged = outputs(original, model)
    return [judge(mutant, model, unchanged) for mutant in sample(original, count)]


def record(outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    """JSON-able counts, by original and by kind of edit, and every live mutant's line."""
    every = [outcome for group in outcomes.values() for outcome in group]
    live = [outcome for outcome in every if outcome.verdict in LIVE]
    kinds = sorted({outcome.mutant.edit.kind for outcome in live})
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mutants": len(live),
        "false_acceptances": sum(outcome.verdict == FALSE for outcome in live),
        "crashes": sum(outcome.verdict == CRASH for outcome in live),
        "originals": {name: _counts(group) for name, group in outcomes.items()},
        "edits": {k: _counts([o for o in live if o.mutant.edit.kind == k]) for k in kinds},
        "outcomes": [[str(o.mutant), o.verdict, " ".join(o.reason.split())[:200]] for o in live],
    }


def _counts(outcomes: list[Outcome]) -> dict[str, int]:
    found = Counter(outcome.verdict for outcome in outcomes)
    return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}


def main() -> None:
    """Judge, print a line for each original, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=60)
    parser.add_argument("--out", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    outcomes: dict[str, list[Outcome]] = {}
    for name, original in originals().items():
        if given.names and name not in given.names:
            continue
        outcomes[name] = judge_original(original, given.sample)
        print(name, _counts(outcomes[name]), flush=True)
        if given.out:
            given.out.write_text(json.dumps(record(outcomes), indent=1) + "\n")


if __name__ == "__main__":
    main()
