from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.capture import APPEND, ATTEND, MASK
from kvquant_compile.capture.mask_kind import mask_kind
from kvquant_compile.errors import CacheError

CPU = torch.device("cpu")


def test_append_is_the_identity_without_a_past_and_refuses_one():
    k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(APPEND(k, v, 0, 0), (k, v), strict=True))
    with pytest.raises(CacheError, match="run_marked"):
        APPEND(k, v, 0, 2)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attend_has_right_gradients(softcap, sinks):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 3, 2, dtype=torch.double, requires_grad=True) for h in (2, 1, 1))
    sink = torch.randn(2, dtype=torch.double, requires_grad=True) if sinks else None
    mask = MASK(None, 1, 3, 0, "sliding", 2, CPU)

    def attend(q, k, v, *sink):
        return ATTEND(q, k, v, mask, *(sink or (None,)), 0, 0.5, softcap, 3, True)

    inputs = (q, k, v, sink) if sinks else (q, k, v)
    # Scores are rounded to float32 on the explicit path, as the models do it.
    exact = not (sinks or softcap)
    assert torch.autograd.gradcheck(
        attend, inputs, eps=1e-6 if exact else 1e-2, atol=1e-5 if exact else 2e-3
    )


def test_rows_without_a_visible_key_stay_finite():
    padding = torch.tensor([[0, 0, 1, 1]])
    mask = MASK(padding, 1, 4, 0, "causal", 0, CPU)
    q = torch.randn(1, 2, 4, 8)
    assert ATTEND(q, q, q, mask, None, 0, 1.0, 0.0, 0, True).isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 5))
def test_mask_is_its_definition(queries, past, window):
    mask = MASK(None, 1, queries, past, "sliding" if window else "causal", window, CPU)[0, 0]
    for i in range(queries):
        for j in range(past + queries):
            seen = j <= past + i and (not window or j > past + i - window)
            assert bool(mask[i, j]) == seen


@pytest.mark.parametrize(
    ("rule", "kind", "window"),
    [
        (lambda q, k: k <= q, "causal", 0),
        (lambda q, k: (k <= q) & (k > q - 7), "sliding", 7),
        (lambda q, k: (k <= q) & (k > q - 4096), "sliding", 4096),
        (lambda q, k: k > -1, "other", 0),
        (lambda q, k: (k <= q) & (k // 8 == q // 8), "chunked", 8),
        (lambda q, k: (k <= q) & (k // 8 == (q + 3) // 8), "other", 0),
        (lambda q, k: (k <= q) & ((k > q - 7) | (k < 4)), "other", 0),
        (lambda q, k: (k <= q + 1) & (k > q - 7), "other", 0),
        (lambda q, k: k < -1, "other", 0),
    ],
)
def test_mask_kinds_by_evaluation(rule, kind, window):
    found = mask_kind(rule)
    assert (found.kind, found.window if found.understood else 0) == (kind, window)
