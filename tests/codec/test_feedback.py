from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.calib.sensitivity import feedback_matrix
from kvquant_compile.codec.feedback import STAGE_CHANNELS, feedback_codes
from kvquant_compile.codec.nuq import levels_of, nearest_codes
from tests.codec.cases import generator, random_feedback, random_table, seeds

HEADS, DIM = 2, 64


def none() -> torch.Tensor:
    return torch.empty(1, HEADS, 50, 0, dtype=torch.uint8)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, bits=st.integers(2, 4))
def test_feedback_lowers_the_correlated_cost(seed: int, bits: int) -> None:
    """With gradients in an 8-dimensional space, most of the error can be moved out of it."""
    g = generator(seed)
    basis = torch.randn(HEADS, 8, DIM, generator=g)
    grad = torch.randn(HEADS, 400, 8, generator=g) @ basis
    matrix = feedback_matrix(grad, torch.ones(HEADS, DIM), 0.01)
    x = torch.randn(1, HEADS, 50, DIM, generator=g) * 50
    table = torch.linspace(-120, 120, 2**bits).round().to(torch.int8).repeat(HEADS, 1)
    if bits == 4:
        x, table = x / 2, (table / 2).round()
    plain = x - levels_of(nearest_codes(x, table), table)
    moved = x - levels_of(feedback_codes(x, table, matrix, none()), table)
    costs = [(e @ grad.transpose(1, 2)).square().sum() for e in (plain, moved)]
    assert float(costs[1]) < 0.8 * float(costs[0])


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_first_stage_and_a_zero_matrix_give_nearest_codes(seed: int) -> None:
    table = random_table(3, HEADS, seed)
    x = torch.randn(1, HEADS, 50, DIM, generator=generator(seed)) * 60
    nearest = nearest_codes(x, table)
    matrix = random_feedback(HEADS, DIM, seed)
    first = feedback_codes(x, table, matrix, none())[..., :STAGE_CHANNELS]
    assert torch.equal(first, nearest[..., :STAGE_CHANNELS])
    assert torch.equal(feedback_codes(x, table, torch.zeros_like(matrix), none()), nearest)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_sums_are_exact_in_any_order(seed: int) -> None:
    """Codes agree with a float64 evaluation, channel by channel in reverse order."""
    table = random_table(2, HEADS, seed)
    matrix = random_feedback(HEADS, DIM, seed)
    x = torch.randn(1, HEADS, 50, DIM, generator=generator(seed)) * 80
    got = feedback_codes(x, table, matrix, none())
    codes = torch.empty_like(got)
    moved = torch.zeros_like(x, dtype=torch.float64)
    for start in range(0, DIM, STAGE_CHANNELS):
        part = slice(start, start + STAGE_CHANNELS)
        wanted = x[..., part] + moved[..., part].float()
        codes[..., part] = nearest_codes(wanted, table)
        error = wanted - levels_of(codes[..., part].contiguous(), table)
        error = ((error * 8).round() / 8).clamp(-63, 63).double()
        for c in reversed(range(STAGE_CHANNELS)):
            row = matrix[:, start + c].double()[:, None] / 64
            moved += error[..., c : c + 1] * row
    assert torch.equal(got, codes)


def test_exact_channels_pass_nothing_on() -> None:
    table = random_table(2, HEADS, 0)
    matrix = random_feedback(HEADS, DIM, 0)
    x = torch.randn(1, HEADS, 50, DIM, generator=generator(0)) * 60
    every = torch.arange(DIM, dtype=torch.uint8).expand(1, HEADS, 50, DIM)
    assert torch.equal(feedback_codes(x, table, matrix, every), nearest_codes(x, table))
