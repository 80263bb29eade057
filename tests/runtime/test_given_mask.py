"""Masks that a multimodal wrapper makes for its backbone."""

from __future__ import annotations

import pytest
import torch

from kvquant_compile.capture.reference import exact_mask
from kvquant_compile.errors import OptionError
from kvquant_compile.runtime.given_mask import padding_of

PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)


def _mask(past: int, steps: int = 3) -> torch.Tensor:
    columns = past + steps
    return exact_mask(PADDED[:, :columns], 2, steps, past, 0, torch.device("cpu")).clone()


def test_two_axes_and_none_are_taken_as_they_are():
    assert padding_of(PADDED, 3) is PADDED
    assert padding_of(None, 3) is None
    assert padding_of({"full_attention": None, "sliding_attention": None}, 0) is None


@pytest.mark.parametrize("past", [0, 3])
def test_padding_is_read_off_a_causal_mask(past):
    assert torch.equal(padding_of(_mask(past), past), PADDED[:, : past + 3])
    added = torch.zeros(2, 1, 3, past + 3).masked_fill(~_mask(past), torch.finfo(torch.float32).min)
    kinds = {"sliding_attention": torch.zeros(2, 1, 3, 4), "full_attention": added}
    assert torch.equal(padding_of(kinds, past), PADDED[:, : past + 3])


def test_a_mask_without_padding_is_none():
    assert padding_of(_mask(3)[1:], 3) is None


def test_what_rows_of_padding_see_does_not_count():
    mask = _mask(0, 6)
    mask[0, :, :2] = True
    assert torch.equal(padding_of(mask, 0), PADDED)


@pytest.mark.parametrize("row", [0, 1])
def test_images_that_see_later_tokens_are_refused(row):
    mask = _mask(0, 6)
    mask[row, 0, 2:4, 2:4] = True
    with pytest.raises(OptionError, match="causal mask with padding"):
        padding_of(mask, 0)


def test_hidden_tokens_and_other_shapes_are_refused():
    mask = _mask(3)
    mask[1, 0, 1, 2] = False
    for bad in (mask, _mask(3)[:, :, :2], torch.ones(3, dtype=torch.bool)[None, :, None]):
        with pytest.raises(OptionError):
            padding_of(bad, 3)
