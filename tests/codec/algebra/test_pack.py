"""Packing is a bijection on codes of every width, and wastes less than a byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant_compile.codec.algebra.pack import MAX_BITS, pack_codes, packed_bytes, unpack_codes


@given(st.integers(1, MAX_BITS), st.integers(1, 41), st.integers(0, 2**16))
@settings(deadline=None, max_examples=60)
def test_codes_come_back(bits: int, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (2, 3, count), generator=g)
    data = pack_codes(codes, bits)
    assert data.dtype == torch.uint8
    assert data.shape == (2, 3, packed_bytes(count, bits))
    assert packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_codes(data, bits, count).long(), codes)


@pytest.mark.parametrize(("bits", "codes", "expected"), [
    (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 1]),
    (4, [1, 2, 15], [0x21, 0x0F]),
    (3, [7, 0, 5], [0b01000111, 0b1]),
    (11, [2047, 1], [0xFF, 0b1111, 0]),
])  # fmt: skip
def test_the_first_code_is_in_the_low_bits(
    bits: int, codes: list[int], expected: list[int]
) -> None:
    assert pack_codes(torch.tensor(codes), bits).tolist() == expected
