"""The laboratory's values as terminal tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvquant_compile.evaluate.table import Row

WORST = 8


def grid_table(rows: Mapping[tuple[int, int], Row], recipe: str) -> Group:
    """Divergence over key bits (down) and value bits (across), effective bits beside it."""
    keys, values = (sorted({pair[i] for pair in rows}) for i in (0, 1))
    title = f"{recipe}: KL in nats (effective bits), key bits down, value bits across"
    table = Table()
    for name in ("K \\ V", *map(str, values)):
        table.add_column(name, justify="right")
    for key in keys:
        cells = [rows[key, value] for value in values]
        table.add_row(str(key), *(f"{r.score.kl:.5f} ({r.effective_bits:.2f})" for r in cells))
    return _titled(title, table)


def needle_table(values: Mapping[str, Any], window: int) -> Group:
    """Accuracy (and loss) of the needle's tokens by depth."""
    title = f"needle in {window} tokens by depth: accuracy of its tokens (nats a token)"
    table = Table()
    table.add_column("codec")
    depths = [entry["depth"] for entry in next(iter(values.values()))["depths"]]
    for depth in depths:
        table.add_column(f"{depth:.0%}", justify="right")
    for name, value in values.items():
        cells = [f"{e['accuracy']:.0%} ({e['loss']:.2f})" for e in value["depths"]]
        table.add_row(name, *cells)
    return _titled(title, table)


def agreement_table(values: Mapping[str, Any], tokens: int) -> Group:
    """Greedy tokens shared with the original, prompt by prompt, and the share of all."""
    title = f"greedy agreement over {tokens} tokens: before the first other one, by prompt"
    table = Table()
    for name in ("codec", "tokens", "mean", "chosen alike"):
        table.add_column(name, justify="left" if name == "codec" else "right")
    for name, value in values.items():
        runs = value["runs"]
        same = [run["same"] for run in runs]
        share = sum(run["share"] for run in runs) / len(runs)
        table.add_row(name, ", ".join(map(str, same)), f"{sum(same) / len(same):.0f}",
                      f"{share:.1%}")  # fmt: skip
    return _titled(title, table)


def errors_table(value: Mapping[str, Any], name: str) -> Group:
    """The layers that hurt most, with their worst head and its worst channels."""
    weighed = "expected loss" if value["weights"] == "fisher" else "squared error"
    title = f"{name}: what hurts most, alone; parts of a layer's {weighed}"
    table = Table()
    for column in ("layer", "part", "KL, nats", "worst head", "its worst channels"):
        table.add_column(column, justify="right" if column == "KL, nats" else "left")
    items = sorted(value["items"], key=lambda item: -item["kl"])[:WORST]
    for item in items:
        head = max(item["heads"], key=lambda h: h["share"])
        table.add_row(
            str(item["layer"]),
            item["part"],
            f"{item['kl']:.5f}",
            f"{head['head']} ({head['share']:.0%})",
            _channels(head["channels"]),
        )
    return _titled(title, table)


def _channels(channels: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{c['channel']} ({c['share']:.1%})" for c in channels)


def _titled(title: str, table: Table) -> Group:
    """A table's own title would be broken to its width."""
    return Group(Text(f"\n{title}", style="italic"), table)
