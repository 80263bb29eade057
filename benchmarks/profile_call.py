"""Calls one contender of the decode table a few times, for a profiler to look at.

    ncu --clock-control none -k regex:history -s 1 -c 1 --section SourceCounters -o report \\
        python -m benchmarks.profile_call --contender "3 bit" --tokens 1048576
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.cases import GROUPED, TINY
from benchmarks.contenders import makers


def main(arguments: list[str] | None = None) -> None:
    """Build the contender and call it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--contender", default="3 bit", choices=list(makers()))
    parser.add_argument("--tokens", type=int, default=131072, choices=[s.tokens for s in GROUPED])
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny size, for a CPU")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    size = TINY[0] if args.tiny else next(s for s in GROUPED if s.tokens == args.tokens)
    (call, *_), *_ = makers()[args.contender](size, device).settings().values()
    for _ in range(args.calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
