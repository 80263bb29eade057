"""The script that profilers run calls what it is asked for, as often as it is asked to."""

from __future__ import annotations

import pytest
import torch

from benchmarks import profile_call
from benchmarks.cases import TINY, Size
from benchmarks.contenders import Contender, makers


def test_it_calls_one_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Size] = []

    def counted(size: Size, device: torch.device) -> Contender:
        contender = makers()["3 bit"](size, device)

        def call() -> object:
            calls.append(size)
            return contender.calls[0]()

        return Contender([call], contender.cache_bytes)

    monkeypatch.setattr(profile_call, "makers", lambda: {"ours": counted})
    profile_call.main(
        ["--tiny", "--device", "cpu", "--contender", "ours", "--calls", "4", "--tokens", "4096"]
    )
    assert calls == [TINY[0]] * 4
