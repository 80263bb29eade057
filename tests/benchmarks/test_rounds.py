"""Contenders of a row run in turn, and one that fails does not stop the others."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import decode_row, rounds
from benchmarks.cases import Size
from benchmarks.contenders import Contender
from benchmarks.decode_attention import compile_tasks
from benchmarks.rounds import LAST, Schedule, alternate, order, sustained

CPU = torch.device("cpu")
SCHEDULE = Schedule(rounds=4, warm=1, slice_seconds=0.02, pause_seconds=0.0, sustained_seconds=0.2)


class Device:
    """A device whose clock falls as it heats up; a contender's slices all last as long as asked."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.log: list[str] = []

    def slice(self, name: str, seconds: float) -> Callable[[float], float]:
        def run(length: float) -> float:
            self.log.append(name)
            self.elapsed += length
            return seconds * (1 + min(self.elapsed, 2.0) / 10)

        return run


def test_every_round_has_everyone_in_another_order() -> None:
    names = ["a", "b", "c"]
    orders = [order(names, n) for n in range(6)]
    assert orders[:3] == [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"]]
    assert all(sorted(o) == names for o in orders)
    assert {o[0] for o in orders} == set(names)
    assert order([], 3) == []


def test_a_result_is_of_the_rounds_after_the_warm_ones() -> None:
    device = Device()
    times, errors = alternate({n: device.slice(n, 1e-3) for n in "abc"}, SCHEDULE)
    assert Counter(device.log) == dict.fromkeys("abc", 5)
    assert [sorted(device.log[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert {n: len(t) for n, t in times.items()} == dict.fromkeys("abc", 4)
    assert errors == {}
    assert min(map(min, times.values())) > 1e-3 * (1 + 3 * 0.02 / 10)  # the first three are warm


def test_heat_does_not_favour_who_ran_first() -> None:
    device = Device()
    names = ["peer", *(f"other {i}" for i in range(11)), "ours"]
    seconds = {n: 2e-3 if n == "peer" else 1e-3 for n in names}
    times, _ = alternate({n: device.slice(n, s) for n, s in seconds.items()}, SCHEDULE)
    ratio = statistics.median(times["peer"]) / statistics.median(times["ours"])
    assert ratio == pytest.approx(2, rel=0.01)
    alone = Device()
    rest = Schedule(sustained_seconds=0.3)
    found = {n: sustained(alone.slice(n, s), rest) for n, s in seconds.items()}
    assert found["peer"] / found["ours"] < 1.8  # what one after another would have said


def test_the_device_rests_before_every_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()

    def rest(seconds: float) -> None:
        assert seconds == 0.5
        device.elapsed = 0.0

    monkeypatch.setattr(rounds.time, "sleep", rest)
    schedule = replace(SCHEDULE, pause_seconds=0.5)
    times, _ = alternate({n: device.slice(n, 1e-3) for n in "abc"}, schedule)
    assert {t for found in times.values() for t in found} == {1e-3 * (1 + 0.02 / 10)}


def test_a_contender_that_fails_leaves_its_error() -> None:
    device = Device()

    def fails_late(length: float) -> float:
        if len(device.log) > 3:
            raise ValueError("no more")
        return device.slice("b", 1e-3)(length)

    slices = {"a": device.slice("a", 1e-3), "b": fails_late, "c": device.slice("c", 1e-3)}
    times, errors = alternate(slices, SCHEDULE)
    assert errors == {"b": "ValueError: no more"}
    assert {n: len(t) for n, t in times.items()} == {"a": 4, "c": 4}


def test_a_sustained_run_counts_its_end() -> None:
    found = iter(range(100))
    assert sustained(lambda _: float(next(found)), SCHEDULE) == statistics.median(
        range(10 - LAST, 10)
    )
    assert next(found) == 10


def test_a_row_takes_the_fastest_setting_and_keeps_errors(monkeypatch: Any) -> None:
    def wait(count: int) -> Callable[[], int]:
        return lambda: sum(range(count))

    def broken() -> None:
        raise ValueError("not here")

    def variants(*_: Any) -> Contender:
        settings = {"slow": [wait(300_000)], "broken": [broken], "fast": [wait(10)]}
        return Contender([], 1000, settings)

    def never(*_: Any) -> Contender:
        return Contender([broken], 1)

    makers = {"a": variants, "b": never, "c": lambda *_: Contender([wait(10)], 7)}
    monkeypatch.setattr(decode_row, "makers", lambda: makers)
    size: Any = None
    short = decode_row.measure(list(makers), size, CPU, replace(SCHEDULE, sustained_from=1.0))
    assert "sustained_us" not in short["c"]
    row = decode_row.measure(list(makers), size, CPU, replace(SCHEDULE, sustained_from=0.0))
    assert row["a"]["setting"] == "fast"
    assert row["a"]["failed_settings"] == ("broken: ValueError: not here",)
    assert row["b"] == {"error": "NoSettingRuns: ValueError: not here"}
    for name, nbytes in (("a", 1000), ("c", 7)):
        result = row[name]
        assert result["us"] == pytest.approx(statistics.median(result["rounds_us"]), abs=1e-3)
        assert len(result["rounds_us"]) == SCHEDULE.rounds
        assert result["cache_bytes"] == nbytes
        assert result["sustained_us"] > 0


def test_what_takes_longest_is_compiled_first() -> None:
    small, large = Size(4, 2, 64), Size(4, 2, 128)
    tasks = compile_tasks(["cudnn bf16", "flex bf16", "fp8", "2 bit"], [small, large])
    assert tasks == [
        ("flex bf16", small), ("flex bf16", large),
        ("fp8", small), ("2 bit", small), ("fp8", large), ("2 bit", large),
    ]  # fmt: skip
    assert compile_tasks(["flash bf16"], [small]) == []
