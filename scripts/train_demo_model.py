"""Train the small model that ships in ``kvquant_compile/assets/demo``.

Three stages, run in order unless ``--stage`` names one:

* ``prepare``: split the corpus, train the tokenizer, encode the training documents;
* ``train``: train a Llama-architecture model from scratch and save it in bf16;
* ``evaluate``: reload what was saved, offline, and measure it.

The stages meet in two folders: ``--out`` receives what ships, ``--work`` what does not (the encoded
corpus, the training log), so a slow machine can prepare and a fast one train.

Example::

    python scripts/train_demo_model.py --corpus corpus.txt.xz --work /tmp/demo \\
        --out kvquant_compile/assets/demo --minutes 6
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo_model.evaluation import evaluate
from demo_model.preparation import prepare
from demo_model.training import Run


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    add = parser.add_argument
    add("--stage", choices=("all", "prepare", "train", "evaluate"), default="all")
    add("--corpus", type=Path, help="text or .xz, documents separated by NUL")
    add("--exclude", type=Path, action="append", default=[], help="text to keep out of training")
    add("--work", type=Path, required=True, help="folder for what does not ship")
    add("--out", type=Path, required=True, help="folder for what ships")
    add("--hold-out", type=int, default=200, help="documents held out, from the corpus's end")
    add("--overlap-limit", type=int, default=10, help="shared shingles that drop a document")
    add("--max-documents", type=int, default=10**9, help="use only so many, from the end")
    add("--sample-bytes", type=int, default=120_000)
    add("--sample-long", type=int, default=20_000, help="characters kept of a long document")
    add("--vocab", type=int, default=4096)
    add("--hidden", type=int, default=256)
    add("--intermediate", type=int, default=704)
    add("--layers", type=int, default=6)
    add("--kv-heads", type=int, default=2)
    add("--context", type=int, default=1024)
    add("--long-context", type=int, default=4096)
    add("--long-share", type=float, default=0.15, help="last share of the run, in long windows")
    add("--batch-tokens", type=int, default=131_072)
    add("--tokens", type=float, default=3.0e8, help="stop after so many")
    add("--minutes", type=float, default=6.0, help="stop after so many")
    add("--lr", type=float, default=3e-3)
    add("--warmup", type=float, default=0.02, help="share of the run")
    add("--weight-decay", type=float, default=0.3)
    add("--seed", type=int, default=20)
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.corpus is None and args.stage in ("all", "prepare"):
        parser.error("--corpus is needed to prepare")
    return args


def main() -> None:
    """Run the stages asked for."""
    args = parse_arguments()
    if args.stage in ("all", "prepare"):
        prepare(args)
    if args.stage in ("all", "train"):
        Run(args).train()
    if args.stage in ("all", "evaluate"):
        evaluate(args)


if __name__ == "__main__":
    main()
