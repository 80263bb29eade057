"""Runs every case through ``kvquant::attend`` on a Hopper GPU; see ``python -m``.

Each is compared with float64 attention over what the pages hold. ``long`` runs lengths up to
70,001 tokens instead, ``2/4`` the third of every four cases.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from kvquant_compile.lowering.gluon import launch
from tests.gluon.cases import BASE, DEFAULT, FEATURES, FORMATS
from tests.lowering.reference import half_rope
from tests.triton.run_cases import check

LONG = {
    f"{name}, lengths to 70001": replace(
        BASE,
        spec=spec,
        rope=rope,
        lengths=(70001, 1, 4096, 33333, 63, 64, 65),
        heads=2,
        slabs=3,
        dtype=dtype,
    )
    for name, spec, rope, dtype in (
        ("3 bit", BASE.spec, half_rope(128, 128, 5e5), torch.float16),
        ("default", DEFAULT, half_rope(128, 128), torch.bfloat16),
        ("no RoPE", BASE.spec, None, torch.float16),
    )
}


def main(part: str = "") -> int:
    """The number of cases that are off."""
    device = torch.device("cuda")
    cases = LONG if part == "long" else FORMATS | FEATURES
    if "/" in part:
        shard, shards = (int(x) for x in part.split("/"))
        cases = dict(list(cases.items())[shard::shards])
    first = next(iter(cases.values())).build().layout
    if not launch.applies(first, device):
        sys.exit("this device does not run the Gluon back end")
    return sum(not check(name, replace(case, device=device)) for name, case in cases.items())


if __name__ == "__main__":
    sys.exit(min(1, main(*sys.argv[1:])))
