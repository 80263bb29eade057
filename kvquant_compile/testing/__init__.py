"""Property-based testing of quantisers: see ``docs/testing.md``.

The assertions need nothing but torch and take our codecs and anybody else's alike. The
strategies (``kv_tensors``, ``profiles``, ``splits``, ``codecs``, ...) need hypothesis, which
``pip install "kvquant-compile[test]"`` installs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvquant_compile.testing.maps import assert_inverse, assert_rope_commutes
from kvquant_compile.testing.numerics import (
    assert_error_bound,
    assert_idempotent,
    assert_nonfinite_policy,
    assert_roundtrip,
    assert_unbiased,
)
from kvquant_compile.testing.storage import (
    assert_append_order_invariant,
    assert_bytes_matter,
    assert_deterministic,
    assert_effective_bits,
)
from kvquant_compile.testing.stream import Stored, streamed
from kvquant_compile.testing.subject import Code, Quantiser, Testable
from kvquant_compile.testing.tensors import Profile, half_pairs, named_profiles, rotate

if TYPE_CHECKING:
    from kvquant_compile.testing.strategies import (
        codecs,
        kv_tensors,
        leaves,
        profiles,
        splits,
        stages,
    )

_STRATEGIES = ("codecs", "kv_tensors", "leaves", "profiles", "splits", "stages")

__all__ = [
    "Code",
    "Profile",
    "Quantiser",
    "Stored",
    "Testable",
    "assert_append_order_invariant",
    "assert_bytes_matter",
    "assert_deterministic",
    "assert_effective_bits",
    "assert_error_bound",
    "assert_idempotent",
    "assert_inverse",
    "assert_nonfinite_policy",
    "assert_rope_commutes",
    "assert_roundtrip",
    "assert_unbiased",
    "codecs",
    "half_pairs",
    "kv_tensors",
    "leaves",
    "named_profiles",
    "profiles",
    "rotate",
    "splits",
    "stages",
    "streamed",
]


def __getattr__(name: str) -> Any:
    """The strategies, on first use: only they need hypothesis."""
    if name not in _STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvquant_compile.testing import strategies

    return getattr(strategies, name)
