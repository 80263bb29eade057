"""Decode attention on a CPU: time by tokens of context, against torch's bfloat16 attention.

    python benchmarks/cpu_decode.py --query-heads 6 --kv-heads 2 --threads 1

One new token attends to a cache of random pages. Contenders take turns, round after round, and the
least of their times counts, so that other work on the machine falls on all of them alike. Torch
is given its two contiguous layouts: keys and values shared by a group (``enable_gqa``), and the
group's query heads as queries of one head; the faster one is the peer. The slope is the least
squares line through all lengths. With one thread the clock is the thread's own processor time,
which stands still while others run; with more it is the wall's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.attend import attend as torch_attend
from kvquant_compile.lowering.cpp.launch import attend
from tests.lowering.reference import half_rope
from tests.triton.cases import Case

Call = Callable[[], object]
Clock = Callable[[], float]
PEERS = ("bf16, enable_gqa", "bf16, group as queries")


def contenders(arguments: argparse.Namespace, tokens: int) -> dict[str, Call]:
    """Name -> one decode step's attention over ``tokens``."""
    heads, dim = arguments.kv_heads, arguments.dim
    rep = arguments.query_heads // heads
    query = torch.randn(1, heads * rep, 1, dim).bfloat16()
    key, value = (torch.randn(1, heads, tokens, dim).bfloat16() for _ in range(2))
    grouped = query.view(1, heads, rep, dim)
    calls: dict[str, Call] = {
        PEERS[0]: lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True),
        PEERS[1]: lambda: scaled_dot_product_attention(grouped, key, value),
    }
    for bits in arguments.bits:
        spec = CodecSpec(bits, bits, 1, 1, True, 1)
        calls[f"{bits} bits"] = _ours(arguments, tokens, spec, attend)
    if arguments.torch:
        calls["3 bits, torch"] = _ours(
            arguments, tokens, CodecSpec(3, 3, 1, 1, True, 1), torch_attend
        )
    return calls


def _ours(
    arguments: argparse.Namespace, tokens: int, spec: CodecSpec, run: Callable[..., object]
) -> Call:
    case = Case(
        spec,
        (arguments.dim, arguments.dim),
        half_rope(arguments.dim, arguments.dim, arguments.theta),
        heads=arguments.kv_heads,
        rep=arguments.query_heads // arguments.kv_heads,
        lengths=(tokens,),
        dtype=torch.bfloat16,
        slabs=1,
    )
    given = case.build().arguments()
    return lambda: run(*given)


def least_times(calls: dict[str, Call], rounds: int, clock: Clock) -> dict[str, float]:
    """Seconds of the fastest call of each, all taking turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock()
            call()
            best[name] = min(best[name], clock() - began)
    return best


def slope(lengths: list[int], seconds: list[float]) -> float:
    """Seconds a token: the least squares line."""
    x, y = torch.tensor(lengths).double(), torch.tensor(seconds).double()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode attention on a CPU.")
    parser.add_argument("--query-heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--theta", type=float, default=1e4, help="base of the rotary frequencies")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(12, 18)])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--torch", action="store_true", help="the torch path as well")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    rows = {
        n: least_times(contenders(arguments, n), arguments.rounds, clock) for n in arguments.tokens
    }
    slopes = {name: slope(list(rows), [row[name] for row in rows.values()]) for name in rows[
        arguments.tokens[0]]}  # fmt: skip
    _print(arguments, rows, slopes)
    if arguments.json:
        record = {
            "query_heads": arguments.query_heads, "kv_heads": arguments.kv_heads,
            "dim": arguments.dim, "threads": arguments.threads, "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(), "theta": arguments.theta,
            "seconds": rows, "seconds_per_token": slopes,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def _print(
    arguments: argparse.Namespace, rows: dict[int, dict[str, float]], slopes: dict[str, float]
) -> None:
    shape = f"{arguments.query_heads}/{arguments.kv_heads} heads of {arguments.dim}"
    table = Table(title=f"{shape}, {arguments.threads} threads, microseconds", title_justify="left")
    for name in ("tokens", *slopes):
        table.add_column(name, justify="right")
    for tokens, row in rows.items():
        table.add_row(f"{tokens:,}", *(f"{row[name] * 1e6:,.0f}" for name in slopes))
    peer = min(slopes[name] for name in PEERS)
    table.add_row("ns a token", *(f"{s * 1e9:.1f}" for s in slopes.values()))
    table.add_row("peer's slope over it", *(f"{peer / s:.2f}x" for s in slopes.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
