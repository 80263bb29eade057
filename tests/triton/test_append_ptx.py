"""The append kernel's PTX, inline assembly and all, against torch to the byte.

See :mod:`.append_ptx`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvquant_compile.codec.spec import CodecSpec
from kvquant_compile.lowering.triton.compat import unavailable
from tests.triton.append_cases import Append, check_append

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")

CPU = torch.device("cpu")
STEPS = ((1, 0), (1, 0), (1, 0), (3, 1), (7, 0), (-9, 0), (1, 0), (6, 2))
"""Steps of one token, whose programs own their words, and of more, whose programs share them; the
last ones overwrite other tokens."""


def default(key_bits: int, value_bits: int, dim: int, **features: Any) -> Append:
    """The default format in float16, two heads with feedback."""
    given = {"heads": 2, "feedback": True, "steps": STEPS, "dtype": torch.float16} | features
    return Append(CodecSpec(key_bits, value_bits, 1, 1, True, 1), (dim, dim), **given)


SMALL = default(3, 3, 32)
SLOW = {
    **{f"{bits} bit, d128": default(bits, bits, 128) for bits in (2, 3, 4)},
    "3 bit, d128, not finite": default(3, 3, 128, strange=0.05),
    "2/4 bit, d128, not finite, bfloat16": default(
        2, 4, 128, heads=1, strange=0.02, dtype=torch.bfloat16
    ),
    "3 bit, d80, not finite": default(3, 3, 80, strange=0.02),
    "4/2 bit, d96, three heads": default(4, 2, 96, heads=3, dtype=torch.float32),
    "2/3 bit, d80, no feedback": default(2, 3, 80, feedback=False),
}


def check(name: str, case: Append, seed: int = 0) -> set[bool]:
    """Run a case; whether the kernels of one token that ran share words."""
    from tests.triton.append_ptx import Device

    device = Device(seed)
    with device.running():
        same = check_append(name, case, CPU)
    assert same, name
    return {spec.shared for spec in device.launched if spec.tokens == 1}


@pytest.mark.parametrize("strange", [0.0, 0.1])
def test_small_heads(strange: float) -> None:
    assert check("small", replace(SMALL, strange=strange)) == {False, True}


def test_the_default_format() -> None:
    assert check("default", default(3, 3, 128, steps=STEPS[:3])) == {False}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_case(name: str) -> None:
    assert check(name, SLOW[name])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_any_order_of_programs_that_share_words(seed: int) -> None:
    assert True in check("order", SMALL, seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"dp2a\.hi\.", "dp2a.lo."),
        (r"\.xor\.b32( *\[)", r".add.u32\1"),
        (r"redux\.sync\.max", "redux.sync.min"),
    ],
)
def test_a_wrong_instruction_is_found_out(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.gluon.ptx.decode import decode
    from tests.triton import append_ptx

    changed = []

    def wrong(spec: Any, *how: Any) -> tuple[Any, int]:
        text, shared = append_ptx.emitted(spec, *how)
        changed.append(re.subn(old, new, text)[1])
        return decode(re.sub(old, new, text), spec.name), shared

    monkeypatch.setattr(append_ptx, "decoded", wrong)
    device = append_ptx.Device()
    with device.running():
        assert not check_append("wrong", SMALL, CPU)
    assert any(changed), "nothing was replaced"
