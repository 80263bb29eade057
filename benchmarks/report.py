"""Rewrites the measured tables from docs/results; nothing in them is typed by hand.

    python -m benchmarks.report            # rewrite
    python -m benchmarks.report --check    # exit with 1 where a table is not what the JSON says

A table stands between ``<!-- table KIND FILE -->`` and ``<!-- end -->`` in docs/performance.md,
docs/accuracy.md or README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import accuracy_tables
from benchmarks.markdown import Record, markdown

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / name for name in ("docs/performance.md", "docs/accuracy.md", "README.md"))
RESULTS = ROOT / "docs" / "results"
PEERS = ("cudnn bf16", "flash bf16", "flex bf16")
MARKED = re.compile(r"(<!-- table (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def origin(record: Record) -> str:
    """Where and when a record was measured."""
    env = record["environment"]
    names = ("torch", "triton", "transformers")
    versions = ", ".join(f"{n} {env[n]}" for n in names if n in env)
    text = f"{env['device']}, {versions}, {env['date']}."
    if "bandwidth" in record:
        read, copy = (record["bandwidth"][k] / 1e12 for k in ("read", "copy"))
        text += f" Bandwidth in this run: {read:.2f} TB/s reading, {copy:.2f} TB/s copying."
    schedules = [row["schedule"] for row in record.get("rows", []) if "schedule" in row]
    if rounds := {s["rounds"] for s in schedules}:
        text += f" Medians of {' or '.join(map(str, sorted(rounds)))} alternating rounds"
        pauses = {s.get("pause_seconds", 0) for s in schedules} - {0}
        rest = " or ".join(f"{1000 * pause:.0f}" for pause in sorted(pauses))
        text += f", {rest} ms of rest before each slice." if rest else ", without rests."
    return " ".join([text, *(f"{note[0].upper()}{note[1:]}." for note in record.get("notes", []))])


def contenders(rows: Sequence[Record]) -> list[str]:
    """Names in the order of the rows' results."""
    return list(dict.fromkeys(name for row in rows for name in row["results"]))


def is_16_bit(name: str) -> bool:
    """Whether a contender attends to an unquantised cache."""
    return name.endswith(("fp16", "bf16"))


def best_peer(results: Record, time: str = "us") -> tuple[str, float]:
    """The fastest bfloat16 peer of a row and its microseconds."""
    times = {name: results[name][time] for name in PEERS if time in results.get(name, {})}
    name = min(times, key=times.__getitem__)
    return name, times[name]


def decode(record: Record) -> str:
    """Microseconds, ratio to the best bfloat16 peer, and TB/s of cache (share of the read rate)."""
    rows = record["rows"]
    names = [n for n in contenders(rows) if not is_16_bit(n)]
    read = record.get("bandwidth", {}).get("read")

    def cell(result: Record, peer: float) -> str:
        if "us" not in result:
            return "failed" if result else ""
        rate = f"{result['bytes_per_second'] / 1e12:.2f}"
        share = f" ({100 * result['bytes_per_second'] / read:.0f} %)" if read else ""
        return f"{result['us']:,.1f} · {peer / result['us']:.2f}x · {rate}{share}"

    lines = []
    for row in rows:
        name, peer = best_peer(row["results"])
        first = f"{peer:,.1f} ({name})"
        lines.append([row["size"], first, *(cell(row["results"].get(n, {}), peer) for n in names)])
    head = ["query/kv heads x tokens", "best bf16 peer", *names]
    return markdown(head, lines)


LOADED_US = 100.0
"""Microseconds of the best peer from which a row keeps the device at its power limit."""


def loaded(rows: Sequence[Record]) -> list[Record]:
    """Rows at the power limit in which contenders also ran alone for a while."""
    return [
        row for row in rows
        if best_peer(row["results"])[1] >= LOADED_US
        and any("sustained_us" in row["results"].get(name, {}) for name in PEERS)
    ]  # fmt: skip


def sustained(record: Record) -> str:
    """Microseconds and ratio to the best bfloat16 peer, each contender having run alone for a
    while; of the rows at the power limit."""
    rows = loaded(record["rows"])
    if not rows:
        return "Not measured in this run."
    names = [n for n in contenders(rows) if not is_16_bit(n)]

    def cell(result: Record, peer: float) -> str:
        if "sustained_us" not in result:
            return "failed" if result else ""
        return f"{result['sustained_us']:,.1f} · {peer / result['sustained_us']:.2f}x"

    lines = []
    for row in rows:
        name, peer = best_peer(row["results"], "sustained_us")
        cells = (cell(row["results"].get(n, {}), peer) for n in names)
        lines.append([row["size"], f"{peer:,.1f} ({name})", *cells])
    return markdown(["query/kv heads x tokens", "best bf16 peer", *names], lines)


def peers(record: Record) -> str:
    """Microseconds of every 16-bit peer."""
    names = [n for n in contenders(record["rows"]) if is_16_bit(n)]
    lines = (
        [row["size"], *(f"{row['results'][n]['us']:,.1f}" if "us" in row["results"].get(n, {})
                        else "failed" for n in names)]
        for row in record["rows"]
    )  # fmt: skip
    return markdown(["query/kv heads x tokens", *names], lines)


SUMMARY_ROWS = ("32/8 x 4k", "32/8 x 128k", "32/8 x 1M", "32/32 x 128k", "32/8 x 16k, batch 32")
SUMMARY_COLUMNS = ("fp8", "4 bit", "3 bit", "3 bit default", "2 bit")


def summary(record: Record) -> str:
    """Times faster than the best bfloat16 peer, at a few sizes."""
    lines = []
    for row in (r for r in record["rows"] if r["size"] in SUMMARY_ROWS):
        name, peer = best_peer(row["results"])
        ratios = (row["results"].get(c, {}).get("us") for c in SUMMARY_COLUMNS)
        cells = (f"{peer / us:.2f}x" if us else "" for us in ratios)
        lines.append([row["size"], f"{peer:,.0f} us ({name})", *cells])
    return markdown(["query/kv heads x tokens", "best bf16 peer", *SUMMARY_COLUMNS], lines)


def model(record: Record) -> str:
    """Tokens per second and memory of whole decode steps."""
    lines = []
    done = [row for row in record["rows"] if "ms" in row]
    for row in sorted(done, key=lambda r: (r["shape"], r["batch"], r["tokens"], r["ms"])):
        same = [r for r in done if all(r[k] == row[k] for k in ("shape", "batch", "tokens"))]
        theirs = [r["ms"] for r in same if not r["contender"].startswith("ours")]
        lines.append([
            f"{row['shape']}, {row['contender']}", f"{row['batch']} x {row['tokens']:,}",
            f"{row['ms']:.2f}", f"{row['tokens_per_second']:,.1f}",
            f"{min(theirs) / row['ms']:.2f}x" if theirs else "",
            f"{row['peak_bytes'] / 1e9:.1f}",
            f"{row['cache_bytes'] / 1e9:.2f}" if "cache_bytes" in row
            else f"{row['dense_cache_bytes'] / 1e9:.2f} at 16 bits",
        ])  # fmt: skip
    head = ["model", "batch x context", "ms a step", "tokens/s", "over the original's best",
            "peak GB", "cache GB"]  # fmt: skip
    return markdown(head, lines)


def prefill(record: Record) -> str:
    """Seconds to the first token, and the ratio to the original."""
    lines = []
    for row in record["rows"]:
        original = row["results"]["original"].get("seconds")
        for name, result in row["results"].items():
            if "seconds" not in result:
                lines.append([name, f"{row['tokens']:,}", "failed", "", ""])
                continue
            ratio = f"{result['seconds'] / original:.3f}" if original else ""
            lines.append([
                name, f"{row['tokens']:,}", f"{result['seconds']:.3f}", ratio,
                f"{result['peak_bytes'] / 1e9:.1f}",
            ])  # fmt: skip
    return markdown(["model", "prompt", "seconds", "over the original", "peak GB"], lines)


def compiling(record: Record) -> str:
    """Seconds of every stage with empty and warm kernel caches."""
    cold, warm = record["cold"], record["warm"]
    table = markdown(
        ["stage", "empty cache, s", "warm, s"],
        ([name, f"{cold[name]:.2f}", f"{warm[name]:.2f}"] for name in cold),
    )
    count = sum(record["kernels"].values())
    return f"{table}\n\n{count} kernels compiled for {record['layers']} layers."


def appending(record: Record) -> str:
    """Microseconds of one layer's append, beside a plain copy of the same tokens."""
    lines = (
        [f"{row['batch']} x {row['tokens']:,}", str(row["bits"]), f"{row['graph']:,.1f}",
         f"{row['launched']:,.1f}", f"{row['copy, graph']:,.1f}"]
        for row in record["rows"]
    )  # fmt: skip
    head = ["sequences x new tokens", "bits", "in a graph", "launched", "a copy, in a graph"]
    return markdown(head, lines)


def chunks(record: Record) -> str:
    """Milliseconds of a chunk's attention over a quantised history, and shares of 16-bit speed."""
    dense = ("flash bf16", "cudnn bf16")

    def cell(result: Record, flash: float, best: float) -> str:
        if "us" not in result:
            return "failed"
        ratios = (f"{peer / result['us']:.2f}x" for peer in (flash, best) if peer)
        return " · ".join([f"{result['us'] / 1e3:.2f}", *ratios])

    lines = []
    for row in (r for r in record["rows"] if "chunk" in r):
        times = [row[p]["us"] for p in dense if "us" in row[p]]
        flash, best = row["flash bf16"].get("us", 0.0), min(times, default=0.0)
        cells = [cell(row[p], 0.0, 0.0) for p in dense]
        cells += [cell(row[n], flash, best) for n in ("3 bits, plain", "3 bits, default")]
        lines.append([f"{row['chunk']:,} over {row['history']:,}", *cells])
    head = ["chunk over history", "flash bf16", "cudnn bf16", "3 bit", "3 bit default"]
    return markdown(head, lines)


KINDS: dict[str, Callable[[Record], str]] = {
    "decode": decode,
    "sustained": sustained,
    "summary": summary,
    "peers": peers,
    "model": model,
    "prefill": prefill,
    "compile": compiling,
    "append": appending,
    "chunks": chunks,
    "pareto": accuracy_tables.pareto,
    "method": accuracy_tables.method,
    "bytes": accuracy_tables.at_equal_bytes,
    "short": accuracy_tables.short,
    "calibrations": accuracy_tables.calibrations,
    "draws": accuracy_tables.draws,
    "calibrating": accuracy_tables.calibrating,
}


def section(kind: str, name: str, folder: Path = RESULTS) -> str:
    """The text of one marked section."""
    path = folder / f"{name}.json"
    if not path.exists():
        return "Not measured yet.\n"
    record = json.loads(path.read_text())
    return f"{KINDS[kind](record)}\n\n{origin(record)}\n"


def rewritten(page: str, folder: Path = RESULTS) -> str:
    """A page with all its tables anew."""
    return MARKED.sub(lambda m: m[1] + section(m[2], m[3], folder) + m[4], page)


def main() -> None:
    """Rewrite or check every page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, stale = parser.parse_args().check, False
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = rewritten(before)
        stale |= before != after
        if not check:
            page.write_text(after, encoding="utf-8")
    sys.exit(int(check and stale))


if __name__ == "__main__":
    main()
