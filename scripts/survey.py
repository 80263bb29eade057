"""What becomes of every causal-LM type of the installed transformers; writes the table.

    python scripts/survey.py [--types llama gptj] [--limit 120] [--out docs]

With ``--types``, other types keep what an earlier run of the same versions found.

Every type is built tiny with random weights, in a child process of its own, and goes through
``optimize`` twice: with lossless pages, where validation and ``generate`` (greedy, a left-padded
batch, windows crossed) must give the original's results, and with 3 bits. Takes about a quarter of
an hour on one core.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.survey.case import FAILED, Outcome, examine, in_child
from tests.survey.half import SAME, compare_half
from tests.survey.table import markdown


def main() -> None:
    """Run the survey and write ``survey.md`` and ``results/survey.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--limit", type=int, default=120, help="seconds for one type")
    parser.add_argument("--half", action="store_true", help="compare with half precision instead")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if arguments.half:
        return compare(arguments.types, arguments.limit, arguments.out / "results")
    outcomes: list[Outcome] = []
    for name in arguments.types:
        outcomes.append(in_child(functools.partial(examine, name), name, arguments.limit))
        print(f"{len(outcomes)}/{len(arguments.types)} {name}: {outcomes[-1].outcome}", flush=True)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    path = arguments.out / "results" / "survey.json"
    outcomes = merged(path, outcomes, versions)
    record = {"versions": versions, "types": [outcome.as_dict() for outcome in outcomes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "survey.md").write_text(page(arguments.out, outcomes, versions))
    if any(outcome.failed for outcome in outcomes):
        sys.exit("some types were accepted and are wrong: see the table")


def compare(types: list[str], limit: int, results: Path) -> None:
    """Add which types have the plans of float32 in half precision to ``half-precision.json``."""
    path = results / "half-precision.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in types:
        found[name] = in_child(functools.partial(half, name), name, limit).why
        print(name, found[name], flush=True)
    path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def half(name: str) -> Outcome:
    """One type's differences as text; ``as float32`` where both dtypes have none."""
    try:
        differences = {k: v for k, v in compare_half(name).items() if v != SAME}
    except Exception as error:
        return Outcome(name, FAILED, str(error))
    return Outcome(name, FAILED, str(differences) if differences else SAME)


def page(out: Path, outcomes: list[Outcome], versions: dict[str, str]) -> str:
    """The page with what the other measurements in ``results`` found."""
    kept = [out / "results" / f"{name}.json" for name in ("half-precision", "capture-time")]
    more = [json.loads(path.read_text()) if path.exists() else {} for path in kept]
    return markdown(outcomes, versions, *more)


def merged(path: Path, outcomes: list[Outcome], versions: dict[str, str]) -> list[Outcome]:
    """The outcomes, with those of other types that an earlier run of the same versions found."""
    found = {}
    if path.exists():
        record = json.loads(path.read_text())
        if record["versions"] == versions:
            found = {row["model_type"]: Outcome(**row) for row in record["types"]}
    found |= {outcome.model_type: outcome for outcome in outcomes}
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    main()
