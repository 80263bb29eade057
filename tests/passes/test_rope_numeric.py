from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.passes import apply_rope
from kvquant_compile.passes.group_law import group_law_residual
from kvquant_compile.passes.rotation import Wave
from kvquant_compile.plan import RopeSpec

SPEC = RopeSpec(((0, 1), (2, 3)), ((0, 2), (1, 3)), (1.0, 0.125), ((4, 4),), 1.5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 7))
def test_it_is_the_definition_channel_by_channel(start, seed):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(start, start + 4)
    got = apply_rope(x, positions, SPEC)
    for (i, j), (a, b), f in zip(SPEC.in_pairs, SPEC.out_pairs, SPEC.frequencies, strict=True):
        t = positions.float() * torch.tensor(f)
        c, s = t.cos() * 1.5, t.sin() * 1.5
        assert torch.equal(got[..., a], c * x[..., i] - s * x[..., j])
        assert torch.equal(got[..., b], s * x[..., i] + c * x[..., j])
    assert torch.equal(got[..., 4], x[..., 4])


def test_positions_per_row_broadcast():
    x = torch.randn(2, 3, 4, 5)
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]])
    got = apply_rope(x, positions[:, None], SPEC)
    for row in range(2):
        assert torch.equal(got[row], apply_rope(x[row], positions[row], SPEC))


def test_group_law_sees_what_structure_does_not():
    right = [{0: Wave("cos", 1.0, 0.5), 1: Wave("sin", -1.0, 0.5)},
             {0: Wave("sin", 1.0, 0.5), 1: Wave("cos", 1.0, 0.5)}]  # fmt: skip
    wrong = [{0: Wave("cos", 1.0, 0.5), 1: Wave("sin", -1.0, 0.25)},
             {0: Wave("sin", 1.0, 0.25), 1: Wave("cos", 1.0, 0.5)}]  # fmt: skip
    assert group_law_residual(right, (0, 1), 1.0) < 1e-12
    assert group_law_residual(wrong, (0, 1), 1.0) > 0.1
