from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.nuq import levels_of, nearest_codes
from tests.codec.cases import generator, random_table, seeds


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), seed=seeds)
def test_nearest_level_against_brute_force(bits: int, seed: int) -> None:
    table = random_table(bits, 2, seed)
    x = torch.randn(2, 2, 9, 16, generator=generator(seed)) * 90
    level = levels_of(nearest_codes(x, table), table)
    distance = (x[..., None] - table.float()[:, None, None]).abs().amin(-1)
    torch.testing.assert_close((x - level).abs(), distance, rtol=0, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(bits=st.integers(1, 7), seed=seeds)
def test_codes_of_levels_are_themselves(bits: int, seed: int) -> None:
    table = random_table(bits, 2, seed)
    codes = torch.randint(0, 2**bits, (1, 2, 5, 8), generator=generator(seed)).to(torch.uint8)
    assert torch.equal(nearest_codes(levels_of(codes, table), table), codes)


def test_ties_go_up_and_nan_to_code_0() -> None:
    for bits in (2, 5):
        table = random_table(bits, 1, 3)
        middle = (table[0, 0].float() + table[0, 1].float()) / 2
        x = torch.stack([middle, torch.tensor(torch.nan)]).view(1, 1, 1, 2)
        assert nearest_codes(x, table).flatten().tolist() == [1, 0]


def test_infinities_take_the_end_codes() -> None:
    x = torch.tensor([-torch.inf, torch.inf]).view(1, 1, 1, 2)
    for bits in (3, 8):
        assert nearest_codes(x, random_table(bits, 1, 0)).flatten().tolist() == [0, 2**bits - 1]
