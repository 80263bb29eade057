"""Time of ``kvquant::append`` on a CUDA device, against torch and against a copy.

    python -m benchmarks.append_speed --no-torch --out docs/results/append-h200.json

One JSON line for each size: microseconds a layer from a call (``launched``), in a CUDA graph
(``graph``), of the torch path, and of copying the same keys and values in the model's dtype. The
format is the default one, with error feedback.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench, do_bench_cudagraph

from benchmarks.measure import environment, save
from benchmarks.synthetic import tables_with_feedback
from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.config import FormatOptions
from kvquant_compile.lowering.append import append as torch_append
from kvquant_compile.lowering.constants import lower_layer
from kvquant_compile.lowering.triton import append as kernels
from kvquant_compile.plan import AttendPlan, LayerPlan
from tests.lowering.reference import half_rope

CUDA = torch.device("cuda")
HEADS, DIM = 8, 128
SIZES = [(1, 1), (32, 1), (1, 16), (1, 128), (1, 512), (1, 2048), (1, 32768)]


def arguments(bits: int, batch: int, steps: int) -> tuple:
    """Arguments of append for a step after 1000 tokens of every sequence."""
    g = torch.Generator().manual_seed(0)
    spec = FormatOptions(bits).spec(0)
    plan = LayerPlan(0, HEADS, DIM, DIM, half_rope(DIM, DIM), (AttendPlan(HEADS, DIM**-0.5),))
    tables = tables_with_feedback(spec, HEADS, DIM, g)
    constants = lower_layer(plan, spec, tables, torch.float16, CUDA)
    fields, geometry = constants.arguments()
    layout = constants.layout
    start = 1000 if steps < PAGE_TOKENS else 0
    pages = -(-(start + steps) // PAGE_TOKENS)
    shape = (batch * pages, HEADS, layout.page_bytes)
    slab = torch.zeros(shape, dtype=torch.uint8, device=CUDA)
    table = torch.arange(batch * pages, dtype=torch.int32, device=CUDA).view(batch, pages)
    slots = start + torch.arange(steps, dtype=torch.int32, device=CUDA).repeat(batch, 1)
    key, value = (
        torch.randn(batch, steps, HEADS, DIM, device=CUDA, dtype=torch.float16).transpose(1, 2)
        for _ in "kv"
    )
    rows = (batch, HEADS, layout.exact_rows, layout.exact_width)
    sinks = torch.zeros(rows, device=CUDA, dtype=torch.float16)
    return key, value, slots, table, [slab], sinks, fields, geometry, str(layout)


def microseconds(call: Callable[[], object], graph: bool = False) -> float:
    """Median time of a call."""
    call()
    time = do_bench_cudagraph(call) if graph else do_bench(call, return_mode="median")
    return round(1e3 * time, 2)


def row(bits: int, batch: int, steps: int, torch_path: bool) -> dict[str, object]:
    """All times of one size."""
    given = arguments(bits, batch, steps)
    key, value = given[:2]
    held = torch.empty_like(key), torch.empty_like(value)

    def copy() -> None:
        held[0].copy_(key)
        held[1].copy_(value)

    out: dict[str, object] = {"bits": bits, "batch": batch, "tokens": steps}
    out["launched"] = microseconds(lambda: kernels.append(*given))
    out["graph"] = microseconds(lambda: kernels.append(*given), graph=True)
    out["copy, graph"] = microseconds(copy, graph=True)
    if torch_path:
        out["torch"] = microseconds(lambda: torch_append(*given))
    return out


def main() -> None:
    """Print a JSON line a size, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warps", type=int, help="warps of a program of sixteen tokens")
    parser.add_argument("--single", type=int, help="longest step of programs of one token")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--no-torch", action="store_true", help="leave the torch path out")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    if options.warps:
        kernels.WARPS[kernels.GROUP_TOKENS] = options.warps
    if options.single is not None:
        kernels.SINGLE_STEPS = options.single
    record: dict[str, Any] = {"environment": environment(), "unit": "microseconds", "rows": []}
    for bits in options.bits:
        for batch, steps in SIZES:
            record["rows"].append(row(bits, batch, steps, not options.no_torch))
            print(json.dumps(record["rows"][-1]), flush=True)
            save(options.out, record)


if __name__ == "__main__":
    main()
