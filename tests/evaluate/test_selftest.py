"""The self-test passes on a sound model, and fails where sabotage goes unnoticed."""

from __future__ import annotations

import pytest

from kvquant_compile.evaluate import selftest
from tests.zoo import tiny, tokens, unproved


def test_selftest_passes_on_a_sound_model() -> None:
    checks = selftest.run_selftest(tiny("llama"))
    assert len(checks) == 3
    assert all(passed for passed, _ in checks.values())


def test_selftest_fails_when_sabotage_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "sabotaged", lambda program: program)
    checks = selftest.run_selftest(tiny("llama"))
    assert not checks["a sabotaged cache changes the scores"][0]


def test_selftest_reports_keys_kept_rotated() -> None:
    passed, detail = selftest.run_selftest(unproved())["every rotation proved"]
    assert not passed
    assert "2 refused [0, 1]" in detail


def test_selftest_runs_on_a_hand_written_decoder() -> None:
    from tests.zoo import decoder

    checks = selftest.run_selftest(decoder("MatmulDecoder").eval(), (tokens(), None))
    assert all(passed for passed, _ in checks.values())
